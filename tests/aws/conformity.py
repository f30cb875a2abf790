"""A boto3 client of EFS that checks all it hears against botocore's own model of EFS: status, required
members, types, enumerations, patterns and bounds; and that errors are of the classes that each operation
declares."""
import datetime
import re

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

# What EFS's own servers answer beside what the model declares.
COMMON = {"ConflictException", "ReplicationAlreadyExists", "AccessDeniedException"}
TYPES = {
    "structure": dict, "list": list, "string": str, "integer": int, "long": int, "boolean": bool,
    "timestamp": datetime.datetime, "double": float,
}


def check(shape, value, path):
    assert isinstance(value, TYPES[shape.type_name]), f"{path}: {value!r} is no {shape.type_name}"
    bounds = shape.metadata
    if shape.type_name == "structure":
        for name in shape.metadata.get("required", []):
            assert name in value, f"{path} lacks {name}: {value}"
        for name, member in shape.members.items():
            if name in value:
                check(member, value[name], f"{path}.{name}")
    elif shape.type_name == "list":
        for item in value:
            check(shape.member, item, f"{path}[]")
    elif shape.type_name == "string":
        if shape.enum:
            assert value in shape.enum, f"{path}: {value!r} is none of {shape.enum}"
        # Python knows no classes of Unicode.
        pattern = bounds.get("pattern", "").replace(r"\p{L}\p{Z}\p{N}", r"\w\s")
        assert re.search(pattern, value), f"{path}: {value!r} is not {pattern}"
    size = len(value) if hasattr(value, "__len__") else value
    if isinstance(size, (int, float)):
        low, high = bounds.get("min", size), bounds.get("max", size)
        assert low <= size <= high, f"{path}: {value!r} is out of bounds"


def heard(http_response, parsed, model, **_):
    status = http_response.status_code
    if status < 300:
        assert status == model.http["responseCode"], f"{model.name}: {status}"
        if model.output_shape is not None:
            check(model.output_shape, parsed, model.name)
        return
    code = parsed["Error"]["Code"]
    declared = {shape.name: shape for shape in model.error_shapes}
    assert code in declared or code in COMMON, f"{model.name} does not declare {code}"
    assert parsed["Error"]["Message"], f"{code} says nothing"
    if code in declared:
        assert status == declared[code].metadata["error"]["httpStatusCode"], f"{code}: {status}"
        for name in declared[code].metadata.get("required", []):
            assert name in parsed or name == "ErrorCode", f"{code} lacks {name}: {parsed}"


def connect(endpoint, key="any", secret="any", **more):
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=60)
    client = boto3.client(
        "efs", endpoint_url=endpoint, region_name="xx-local", aws_access_key_id=key,
        aws_secret_access_key=secret, config=config, **more)
    client.meta.events.register("after-call.efs", heard)
    return client


def refused(name, call, *args, **more):
    try:
        answer = call(*args, **more)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        assert code == name, f"{name} was expected: {error}"
        return error.response
    raise AssertionError(f"{name} was expected, not {answer}")
