"""Secrets as canaries: after a run that used them, no file of it has one in it, as it is or in another coding."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.cloud_pool import POOL, WORKER_SECRETS, SimulatedCloud
from tests.main_job import MainJob
from tests.prefect_server import Prefect
from tests.tpu_pool import job_variables, last_names, until

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow

SHORT = (
    "--train.num-train-steps",
    "60",
    "--train.steps-per-export",
    "30",
    "--train.steps-per-eval",
    "60",
    "--train.steps-per-sample",
    "60",
)
HOST_SECRETS = {"WANDB_API_KEY": "canary-of-the-host-wandb", "HF_TOKEN": "canary-of-the-host-hub"}
CONTROL_SECRETS = {"WANDB_API_KEY": "canary-of-the-control-wandb", "HF_TOKEN": "canary-of-the-control-hub"}


def codings(secret: str) -> list[bytes]:
    """The secret, and what of it stands in any base64 text around it, wherever it begins; and quoted for an address."""
    found = [secret.encode(), quote(secret, safe="").encode(), json.dumps(secret).encode()]
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + secret.encode()).rstrip(b"=")
        found.append(coded[4 if before else 0 : -1])
    return found


def holders(places: list[Path], secrets: list[str]) -> list[str]:
    """Files that have a secret in them, and which."""
    wanted = {coding: secret for secret in secrets for coding in codings(secret)}
    found: list[str] = []
    for place in places:
        for path in (path for path in place.rglob("*") if path.is_file()):
            data = path.read_bytes()
            found += [f"{path}: {secret}" for coding, secret in wanted.items() if coding in data]
    return found


def test_a_canary_is_found(tmp_path: Path) -> None:
    """The search itself."""
    for number in range(5):
        (tmp_path / f"{number}.db").write_bytes(b"x" + base64.b64encode(b"\0" * number + b"user:canary-of-nobody and so on"))
    (tmp_path / "log").write_text("token=canary-of-nobody")
    assert len({line.split(": ")[0] for line in holders([tmp_path], ["canary-of-nobody"])}) == 6


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_no_file_has_a_secret(
    prefect: Prefect, cloud: SimulatedCloud, start: Callable[..., MainJob], root: Path, tmp_path: Path, end: str
) -> None:
    cloud.secrets.update(wandb=HOST_SECRETS["WANDB_API_KEY"], hub=HOST_SECRETS["HF_TOKEN"])
    named = {
        "WANDB_API_KEY": "projects/p/secrets/wandb",
        "HF_TOKEN": "projects/p/secrets/hub" if end == "completed" else "projects/p/secrets/no",
    }
    metadata: list[str] = []
    with job_variables(prefect, POOL, secrets=named, env={"WANDB_MODE": "offline"}, max_failures=0):
        job = start(*SHORT, "--track", "wandb", pool=POOL, **CONTROL_SECRETS)
        metadata.append(str(cloud.api.get(cloud.one())))
        status = job.status()
    cloud.gone()
    assert status == (0 if end == "completed" else 1), job.output
    assert last_names(prefect)[-1] == ("Completed" if end == "completed" else "GaveUp")
    until(lambda: not any((cloud.directory / "disks").iterdir()), "empty disks")
    seen = json.dumps([prefect.post("/flow_runs/filter"), prefect.post("/logs/filter"), prefect.post("/artifacts/filter"), metadata])
    (tmp_path / "seen.json").write_text(seen)
    secrets = [*HOST_SECRETS.values(), *CONTROL_SECRETS.values(), *WORKER_SECRETS.values()]
    assert holders([prefect.home, cloud.directory, tmp_path], secrets) == []
    if end == "completed":
        assert [*root.rglob("*.wandb")], "the trainer had the tracker, and so the key"


def test_a_secret_block_is_not_written_into_metadata(
    prefect: Prefect, cloud: SimulatedCloud, start: Callable[..., MainJob], root: Path, tmp_path: Path
) -> None:
    """Prefect puts the value of a block where a job variable names it, and everybody in the project can read a slice's metadata."""
    types = prefect.post("/block_types/filter", block_types={"slug": {"any_": ["secret"]}})
    schema = prefect.post("/block_schemas/filter", block_schemas={"block_type_id": {"any_": [types[0]["id"]]}})[0]
    block = {"name": "canary", "block_type_id": types[0]["id"], "block_schema_id": schema["id"], "data": {"value": "canary-of-the-block"}}
    prefect.post("/block_documents/", **block)
    with job_variables(prefect, POOL, env={"OPENING": "{{ prefect.blocks.secret.canary }}"}):
        job = start(*SHORT, pool=POOL)
        assert job.status() == 1, job.output
    assert "the Prefect block secret.canary" in job.output
    assert "Secret Manager" in job.output
    assert not cloud.states()
    assert holders([prefect.home, cloud.directory, tmp_path], ["canary-of-the-block"]) == []
