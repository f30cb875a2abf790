"""ENDPOINT DIRECTORY: registered file systems below DIRECTORY, replicated by a daemon that runs both sides
(which has one configuration of its own, made when it was started)."""
import os
import sys
import time

from conformity import connect, refused

ENDPOINT, BASE = sys.argv[1:]
PATIENCE = float(os.environ.get("REPLICATOR_PATIENCE", "120"))
efs = connect(ENDPOINT)
UNKNOWN = "fs-0123abcd"


def until(what, look):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {PATIENCE} s: {what}")


def path(name):
    return os.path.join(BASE, name)


def register(name):
    tags = [{"Key": "replicator:path", "Value": path(name)}, {"Key": "Name", "Value": name}]
    made = efs.create_file_system(CreationToken=name, Tags=tags)
    assert made["LifeCycleState"] == "available" and made["Name"] == name, made
    assert made["FileSystemProtection"]["ReplicationOverwriteProtection"] == "ENABLED", made
    return made["FileSystemId"]


def replicate(source, destination):
    return efs.create_replication_configuration(
        SourceFileSystemId=source, Destinations=[{"FileSystemId": destination, "Region": "xx-local"}])


def destination(source):
    described = efs.describe_replication_configurations(FileSystemId=source)
    [configuration] = described["Replications"]
    [end] = configuration["Destinations"]
    return end


def protection(file_system):
    [found] = efs.describe_file_systems(FileSystemId=file_system)["FileSystems"]
    return found["FileSystemProtection"]["ReplicationOverwriteProtection"]


def write(name, content):
    with open(path(name), "w") as file:
        file.write(content)


# Several pairs, by id.
names = ["one", "two", "three"]
pairs = [(register(f"source-{name}"), register(f"replica-{name}")) for name in names]
(source, replica), others = pairs[0], pairs[1:]
write("source-one/file", "content")
write("replica-one/extra", "of the replica")

# Errors of creation, each of its class.
refused("ConflictException", replicate, source, replica)
refused("FileSystemNotFound", replicate, UNKNOWN, replica)
refused("FileSystemNotFound", replicate, source, UNKNOWN)
refused("BadRequest", replicate, "bogus", replica)
refused("BadRequest", replicate, "fs-bogus", replica)
refused("ValidationException", efs.create_replication_configuration, SourceFileSystemId=source,
        Destinations=[])
refused("ValidationException", replicate, source, "no token")
refused("ReplicationNotFound", efs.describe_replication_configurations, FileSystemId=source)
refused("FileSystemNotFound", efs.describe_replication_configurations, FileSystemId=UNKNOWN)
refused("ReplicationNotFound", efs.delete_replication_configuration, SourceFileSystemId=source)
refused("FileSystemNotFound", efs.delete_replication_configuration, SourceFileSystemId=UNKNOWN)
again = refused("FileSystemAlreadyExists", efs.create_file_system, CreationToken="source-one",
                Tags=[{"Key": "replicator:path", "Value": path("elsewhere")}])
assert again["FileSystemId"] == source, again
refused("BadRequest", efs.create_file_system, CreationToken="without a path")
refused("BadRequest", efs.update_file_system_protection, FileSystemId=replica,
        ReplicationOverwriteProtection="REPLICATING")

# create -> ENABLING -> ENABLED.
changed = efs.update_file_system_protection(
    FileSystemId=replica, ReplicationOverwriteProtection="DISABLED")
assert changed["ReplicationOverwriteProtection"] == "DISABLED", changed
[arn] = [one["FileSystemArn"] for one in efs.describe_file_systems(FileSystemId=source)["FileSystems"]]
created = replicate(arn, replica)
assert created["SourceFileSystemId"] == source, created
assert created["SourceFileSystemArn"] == arn, created
[first] = created["Destinations"]
assert (first["FileSystemId"], first["Status"]) == (replica, "ENABLING"), created
assert "LastReplicatedTimestamp" not in first, created
until("ENABLED", lambda: destination(source)["Status"] == "ENABLED")
with open(path("replica-one/file")) as file:
    assert file.read() == "content"
assert not os.path.exists(path("replica-one/extra"))

# An idle source's timestamp moves on.
before = until("a timestamp", lambda: destination(source).get("LastReplicatedTimestamp"))
until("a later one", lambda: destination(source)["LastReplicatedTimestamp"] > before)

# While it replicates.
assert (protection(source), protection(replica)) == ("ENABLED", "REPLICATING")
for end in (source, replica):
    refused("ReplicationAlreadyExists", efs.update_file_system_protection, FileSystemId=end,
            ReplicationOverwriteProtection="DISABLED")
    refused("FileSystemInUse", efs.delete_file_system, FileSystemId=end)
refused("ReplicationAlreadyExists", replicate, source, others[0][1])
refused("ReplicationAlreadyExists", replicate, others[0][0], replica)
try:
    write("replica-one/x", "")
    raise AssertionError("a replica was written to")
except OSError:
    pass

# Several beside each other, page by page.
for one, other in others:
    efs.update_file_system_protection(FileSystemId=other, ReplicationOverwriteProtection="DISABLED")
    replicate(one, other)
whole = [one["SourceFileSystemId"] for one in efs.describe_replication_configurations()["Replications"]]
assert len(whole) == 4 and whole[1:] == [one for one, _ in pairs], whole
paged, token = [], {}
while True:
    page = efs.describe_replication_configurations(MaxResults=1, **token)
    paged += [one["SourceFileSystemId"] for one in page["Replications"]]
    if "NextToken" not in page:
        break
    token = {"NextToken": page["NextToken"]}
assert paged == whole, paged
refused("BadRequest", efs.describe_replication_configurations, NextToken="bogus")
for operation in ("describe_replication_configurations", "describe_file_systems"):
    if efs.can_paginate(operation):
        pages = list(efs.get_paginator(operation).paginate(PaginationConfig={"PageSize": 3}))
        assert len(pages) > 1, operation
listed = []
for page in efs.get_paginator("describe_file_systems").paginate(PaginationConfig={"PageSize": 3}):
    listed += [one["FileSystemId"] for one in page["FileSystems"]]
assert len(listed) == 8 and {one for pair in pairs for one in pair} <= set(listed), listed
for one, _ in others:
    until("ENABLED", lambda: destination(one)["Status"] == "ENABLED")

# Tags.
efs.tag_resource(ResourceId=source, Tags=[{"Key": "tier é", "Value": "gold/1"}, {"Key": "b", "Value": ""}])
tags = {tag["Key"]: tag["Value"] for tag in efs.list_tags_for_resource(ResourceId=arn)["Tags"]}
assert tags == {"replicator:path": path("source-one"), "Name": "source-one", "tier é": "gold/1", "b": ""}
page = efs.list_tags_for_resource(ResourceId=source, MaxResults=1)
rest = efs.list_tags_for_resource(ResourceId=source, NextToken=page["NextToken"])
assert len(page["Tags"]) + len(rest["Tags"]) == 4, (page, rest)
efs.untag_resource(ResourceId=source, TagKeys=["tier é", "b"])
assert len(efs.list_tags_for_resource(ResourceId=source)["Tags"]) == 2
refused("BadRequest", efs.tag_resource, ResourceId=source,
        Tags=[{"Key": "replicator:path", "Value": "/other"}])
refused("FileSystemNotFound", efs.list_tags_for_resource, ResourceId=UNKNOWN)

# Deleting fails over.
efs.delete_replication_configuration(SourceFileSystemId=source)
write("replica-one/x", "writable")
assert (protection(source), protection(replica)) == ("ENABLED", "ENABLED")
refused("ReplicationNotFound", efs.describe_replication_configurations, FileSystemId=source)
refused("ConflictException", replicate, source, replica)
efs.delete_replication_configuration(
    SourceFileSystemId=others[0][0], DeletionMode="LOCAL_CONFIGURATION_ONLY")
write("replica-two/x", "writable")

# And the way back, under the same ids.
efs.update_file_system_protection(FileSystemId=source, ReplicationOverwriteProtection="DISABLED")
replicate(replica, source)
until("ENABLED", lambda: destination(replica)["Status"] == "ENABLED")
with open(path("source-one/x")) as file:
    assert file.read() == "writable"
efs.delete_replication_configuration(SourceFileSystemId=replica)
for one in (source, replica):
    efs.delete_file_system(FileSystemId=one)
    refused("FileSystemNotFound", efs.describe_file_systems, FileSystemId=one)
assert os.path.exists(path("replica-one/x"))
