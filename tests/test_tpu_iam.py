"""The roles hold what the code asks of Google Cloud, and no more: a call that is new here needs its permission there.

Sources: cloud.google.com/iam/docs/roles-permissions/tpu, cloud.google.com/storage/docs/access-control/iam-json,
cloud.google.com/secret-manager/docs/access-control, cloud.google.com/artifact-registry/docs/access-control.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
TPU = CHECKOUT / "deployments" / "tpu"

# Methods of Google's client: queued resources and guest attributes go by the permissions of nodes.
TPU_METHODS = {
    "create_queued_resource": {"tpu.nodes.create"},
    "list_queued_resources": {"tpu.nodes.list"},
    "get_queued_resource": {"tpu.nodes.get"},
    "delete_queued_resource": {"tpu.nodes.delete"},
    "get_node": {"tpu.nodes.get"},
    "get_guest_attributes": {"tpu.nodes.get"},
    "list_accelerator_types": {"tpu.acceleratortypes.list"},
}
# Requests of the JSON interface, as `tasks.object_requests.send` has them. Who replaces an object deletes one.
STORAGE_REQUESTS = {
    ("GET", "b/{}/o/{}"): {"storage.objects.get"},
    ("GET", "b/{}/o"): {"storage.objects.list"},
    ("POST", "{base}/upload/storage/v1/b/{}/o"): {"storage.objects.create", "storage.objects.delete"},
    ("DELETE", "b/{}/o/{}"): {"storage.objects.delete"},
}
# The same, before a slice is asked for and by the doctor: no host of a slice asks it.
BUCKET_REQUESTS = {("GET", "b/{}"): {"storage.buckets.get"}}
# Of Google's Service Usage, by the doctor.
QUOTA_REQUESTS = {"consumerQuotaMetrics": {"serviceusage.quotas.get"}}
# What hosts ask for before their command runs, by the URL that says it: secrets and the image.
HOST_REQUESTS = {
    "https://secretmanager.googleapis.com": {"secretmanager.versions.access"},
    "docker pull": {"artifactregistry.repositories.downloadArtifacts"},
}


def role(name: str) -> dict[str, Any]:
    return yaml.safe_load((TPU / "iam" / f"{name}.yaml").read_text(encoding="utf-8"))


def calls(package: Path) -> list[ast.Call]:
    files = [path for path in package.rglob("*.py") if "emulator" not in path.parts]
    return [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def tpu_methods_called() -> set[str]:
    """Methods called on an attribute `_client` of Cloud TPU's."""
    names = (call.func for call in calls(TPU) if isinstance(call.func, ast.Attribute))
    return {name.attr for name in names if isinstance(name.value, ast.Attribute) and ast.unparse(name.value) == "self._client"}


def storage_requests_sent() -> set[tuple[str, str]]:
    sent = (call.args for call in calls(CHECKOUT / "tasks") if isinstance(call.func, ast.Name) and call.func.id == "send")
    return {(ast.literal_eval(arguments[1]), ast.literal_eval(arguments[2])) for arguments in sent}


def test_every_call_is_in_the_tables() -> None:
    assert tpu_methods_called() == TPU_METHODS.keys()
    quota = (TPU / "quota.py").read_text(encoding="utf-8")
    assert set(re.findall(r"/services/[\w.]+/(\w+)", quota)) == QUOTA_REQUESTS.keys()
    assert storage_requests_sent() == STORAGE_REQUESTS.keys() | BUCKET_REQUESTS.keys()


def test_hosts_write_their_logs_with_the_same() -> None:
    log = (TPU / "host_log.py").read_text(encoding="utf-8")
    assert set(re.findall(r'_call\("(\w+)"', log)) == {method for method, _ in STORAGE_REQUESTS}
    agent = (TPU / "host_agent.py").read_text(encoding="utf-8")
    assert set(re.findall(r'"(https://[\w.]+)"', agent)) | {"docker pull"} == HOST_REQUESTS.keys()
    assert '"docker", "pull"' in agent


def test_the_roles_have_these_and_no_more() -> None:
    worker, slice_account = role("worker"), role("slice")
    assert set(worker["includedPermissions"]) == set().union(*TPU_METHODS.values(), *BUCKET_REQUESTS.values(), *QUOTA_REQUESTS.values())
    assert set(slice_account["includedPermissions"]) == set().union(*STORAGE_REQUESTS.values(), *HOST_REQUESTS.values())


@pytest.mark.parametrize("name", ["worker", "slice"])
def test_gcloud_takes_the_file(name: str) -> None:
    assert role(name).keys() == {"title", "description", "stage", "includedPermissions"}
    permissions = role(name)["includedPermissions"]
    assert permissions == sorted(set(permissions))
    assert all(re.fullmatch(r"[a-z]+\.[a-zA-Z]+\.[a-zA-Z]+", permission) for permission in permissions)
