"""Makes vectors.json: requests as botocore signs them. `pip install botocore==1.44.8`, then
`python3 vectors.py > vectors.json`."""
import datetime
import json

import botocore.auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

KEY = ("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
ARN = "arn%3Aaws%3Aelasticfilesystem%3Axx-local%3A000000000000%3Afile-system%2Ffs-01234567"
BASE = "/2015-02-01/file-systems"
REQUESTS = [
    ("GET", BASE, ""),
    ("GET", f"{BASE}?MaxItems=2&Marker=a%2Fb%3D%3D&CreationToken=x%20y~z", ""),
    ("GET", f"{BASE}/replication-configurations?NextToken=%2B%C3%A9&MaxResults=1", ""),
    ("POST", f"{BASE}/{ARN}/replication-configuration", '{"Destinations": [{"Region": "é"}]}'),
    ("POST", f"{BASE}//replication-configuration", '{"Destinations": []}'),
    ("POST", f"{BASE}/%2Fsrv%2Fa%20b%25/replication-configuration", "{}"),
    ("DELETE", "/2015-02-01/resource-tags/fs-01234567?tagKeys=b&tagKeys=a%20c&tagKeys", ""),
    ("PUT", f"{BASE}/./a/../fs-01234567/protection/", "x" * 1000),
]


class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 29, 1, 2, 3, tzinfo=tz)

    @classmethod
    def utcnow(cls):
        return cls(2026, 11, 29, 1, 2, 3)


def frozen(*_args, **_kwargs):
    return Frozen.now()


botocore.auth.datetime = Frozen
botocore.auth.get_current_datetime = frozen


def signed(method, target, body):
    request = AWSRequest(method, "http://127.0.0.1:4480" + target, data=body.encode())
    request.headers["User-Agent"] = "aws-cli/1  md/x"
    request.headers["X-Odd"] = "  two   blanks  "
    auth = botocore.auth.SigV4Auth(Credentials(*KEY), "elasticfilesystem", "xx-local")
    auth.add_auth(request)
    headers = {name.lower(): value for name, value in request.headers.items()}
    headers["host"] = "127.0.0.1:4480"
    return {"method": method, "target": target, "headers": headers, "body": body}


print(json.dumps([signed(*request) for request in REQUESTS], indent=1))
