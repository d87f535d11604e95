"""Secrets as canaries: after a run that used them, no file of it has one in it, as it is or in another coding."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.cloud_pool import POOL, WORKER_SECRETS, CloudRun, SimulatedCloud
from tests.main_job import MainJob
from tests.prefect_server import Prefect
from tests.tpu_pool import job_variables, until

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
def test_no_file_has_a_secret_of_a_host(prefect: Prefect, cloud: SimulatedCloud, finished: MainJob, tmp_path: Path, end: str) -> None:
    cloud.secrets.update(wandb=HOST_SECRETS["WANDB_API_KEY"], hub=HOST_SECRETS["HF_TOKEN"])
    named = {name: f"projects/p/secrets/{secret}" for name, secret in (("WANDB_API_KEY", "wandb"), ("HF_TOKEN", "hub"))}
    if end == "failed":
        named["HF_TOKEN"] += "-of-another"
    with job_variables(prefect, POOL, secrets=named, env={"WANDB_MODE": "offline"}, max_failures=0):
        run = CloudRun(prefect, finished, tmp_path, track=["wandb"])
        run.submit()
        metadata = str(cloud.api.get(cloud.one()))
        run.until_final("Completed" if end == "completed" else "GaveUp")
    cloud.gone()
    until(lambda: not any((cloud.directory / "disks").iterdir()), "empty disks")
    seen = [prefect.post("/flow_runs/filter"), prefect.post("/logs/filter"), prefect.post("/artifacts/filter"), metadata]
    (tmp_path / "seen.json").write_text(json.dumps(seen))
    assert holders([prefect.home, cloud.directory, tmp_path], [*HOST_SECRETS.values(), *WORKER_SECRETS.values()]) == []
    if end == "completed":
        assert [*run.directory.rglob("*.wandb")], "the trainer had the tracker, and so the key"


def test_no_file_has_a_secret_of_the_control_flow(prefect: Prefect, start: Callable[..., MainJob], tmp_path: Path) -> None:
    start(*SHORT, "--track", "wandb", **CONTROL_SECRETS).succeed()
    assert holders([prefect.home, tmp_path], [*CONTROL_SECRETS.values()]) == []


def test_a_secret_block_is_not_written_into_metadata(prefect: Prefect, cloud: SimulatedCloud, finished: MainJob, tmp_path: Path) -> None:
    """Prefect puts the value of a block where a job variable names it, and everybody in the project can read a slice's metadata."""
    types = prefect.post("/block_types/filter", block_types={"slug": {"any_": ["secret"]}})
    schema = prefect.post("/block_schemas/filter", block_schemas={"block_type_id": {"any_": [types[0]["id"]]}})[0]
    block = {"name": "canary", "block_type_id": types[0]["id"], "block_schema_id": schema["id"], "data": {"value": "canary-of-the-block"}}
    prefect.post("/block_documents/", **block)
    with job_variables(prefect, POOL, env={"OPENING": "{{ prefect.blocks.secret.canary }}"}):
        run = CloudRun(prefect, finished, tmp_path)
        run.submit()
        message = run.until_final("GaveUp")["message"]
    assert "the Prefect block secret.canary" in message
    assert "Secret Manager" in message
    assert not cloud.states()
    assert holders([prefect.home, cloud.directory, tmp_path], ["canary-of-the-block"]) == []
