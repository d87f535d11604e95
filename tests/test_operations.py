"""What keeps a pool in order, on a real server: the doctor's report, and the flow that deletes slices which nobody needs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from deployments.tpu.cloud import CloudTpu
from deployments.tpu.emulator.address import running_emulator
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.request import SliceName, labels
from tests.prefect_server import CHECKOUT, Prefect, prefect_server
from tests.tpu_pool import Slices, on_pool, until, work_pools

pytestmark = pytest.mark.slow

SCRIPT = {"startup-script": "#!/bin/sh\nexec sleep 1000\n", "enable-guest-attributes": "TRUE"}


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home)) as prefect:
        yield prefect


def doctor(prefect: Prefect, pool: str, root: str, *, status: int) -> str:
    """What it says, without how the table breaks its lines."""
    line = [sys.executable, "flows/train.py", "doctor", "--pool", pool, "--root", root]
    environment = {**os.environ, **prefect.environment, "COLUMNS": "400"}
    done = subprocess.run(line, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return " ".join(done.stdout.replace("│", " ").split())


def test_the_doctor_finds_what_a_pool_lacks_and_nothing_when_it_is_there(prefect: Prefect, tmp_path: Path) -> None:
    root = str(tmp_path / "artifacts")
    ill = doctor(prefect, "tpu", root, status=1)
    assert "no worker of the work pool 'tpu' is online" in ill
    assert "`prefect worker start --pool tpu`" in ill
    assert "'silent flow runs crashed' is not there `python -m deployments.automations`" in ill
    assert "no such work pool (there are: local, tpu)" in doctor(prefect, "tup", root, status=1)

    subprocess.run([sys.executable, "-m", "deployments.automations"], cwd=CHECKOUT, env=prefect.environment, check=True, timeout=120)
    worker = prefect.start("worker", "start", "--pool", "tpu", "--name", "w")
    until(lambda: "'status': 'ONLINE'" in str(prefect.post("/work_pools/tpu/workers/filter")), "a worker that is online", 60)
    well = doctor(prefect, "tpu", root, status=0)
    for words in ("runs Prefect 3.", "within", "online: w", "'silent flow runs crashed' is there", "training asks for 'tpu'", "simulated"):
        assert words in well, well
    worker.terminate()
    worker.wait(timeout=60)

    prefect.run("work-pool", "pause", "tpu")
    assert "the work pool 'tpu' is paused `prefect work-pool resume tpu`" in doctor(prefect, "tpu", root, status=1)
    prefect.run("work-pool", "resume", "tpu")


def test_the_sweeper_deletes_orphans_and_leaves_what_is_needed(prefect: Prefect) -> None:
    address = running_emulator(prefect.home / "tpu-emulator")
    slices = Slices(prefect.home)
    deployment = httpx.get(f"{prefect.api}/deployments/name/pretrain/tpu", timeout=30).json()["id"]
    live, ended = (
        prefect.post(f"/deployments/{deployment}/create_flow_run", parameters={"job": {}}, enforce_parameter_schema=False)["id"]
        for _ in range(2)
    )
    for run, state in ((live, "RUNNING"), (ended, "CANCELLED")):
        prefect.post(f"/flow_runs/{run}/set_state", state={"type": state}, force=True)
    runs = {"orphan": uuid4(), "live": UUID(live), "ended": UUID(ended)}

    async def ask() -> dict[str, str]:
        configuration, cloud = TPUJobConfiguration(), CloudTpu(address)
        zone = configuration.places[0]
        return {
            what: await cloud.create(configuration, zone, str(SliceName(run, 1)), labels(configuration, run, "tpu"), SCRIPT)
            for what, run in runs.items()
        }

    names = asyncio.run(ask())
    until(lambda: set(slices.states().values()) == {"ACTIVE"}, "three slices", 60)
    worker = prefect.start("worker", "start", "--pool", "local")
    try:
        run_once(prefect, "--param", "minutes=0", "--param", "dry_run=true")
        assert set(slices.states()) == {*names.values()}, "a dry run deletes nothing"
        run_once(prefect, "--param", "minutes=0")
        until(lambda: set(slices.states()) == {names["live"]}, "the end of the other slices", 60)
    finally:
        worker.terminate()
        worker.wait(timeout=60)
        asyncio.run(delete(address, [*slices.states()]))  # the emulator ends when it has none
    (table,) = [artifact for artifact in prefect.post("/artifacts/latest/filter") if artifact["key"] == "swept-slices"]
    assert names["orphan"] in table["data"]
    assert "its flow run was deleted" in table["data"]
    assert names["live"] not in table["data"]


async def delete(address: str, names: list[str]) -> None:
    cloud = CloudTpu(address)
    for name in names:
        await cloud.delete(name)


def run_once(prefect: Prefect, *parameters: str) -> None:
    """One run of sweep-tpu on the worker, to its good end."""
    before = len(prefect.flow_runs("sweep-tpu"))
    prefect.run("deployment", "run", "sweep-tpu/sweep-tpu", *parameters)

    def last() -> str:
        runs = prefect.flow_runs("sweep-tpu")
        return runs[-1]["state"]["type"] if len(runs) > before else ""

    ended = until(lambda: (state := last()) in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and state, "the end of sweep-tpu")
    assert ended == "COMPLETED", (prefect.home / "worker.log").read_text()[-3000:]


def test_a_pool_that_cannot_take_the_run_is_told_before_any_work(prefect: Prefect, tmp_path: Path) -> None:
    before = len(prefect.flow_runs("pretrain"))
    deployment = httpx.get(f"{prefect.api}/deployments/name/pretrain/tpu", timeout=30).json()["id"]
    change_variables(prefect, deployment, {"provider": "cloud", "project": "p", "zones": ["us-central2-b"]})
    try:
        job = on_pool(prefect, tmp_path / "root", tmp_path)
        assert job.status() == 1, job.output
        assert f"--root={tmp_path / 'root'} is a directory of this machine" in job.output
        assert "give --root gs://bucket/prefix" in job.output
        change_variables(prefect, deployment, {"accelerator_type": "v4-17"})
        job = on_pool(prefect, tmp_path / "root", tmp_path)
        assert job.status() == 1, job.output
        assert "accelerator_type='v4-17' of the work pool 'tpu': unknown TPU slice 'v4-17': did you mean" in job.output
    finally:
        change_variables(prefect, deployment, {})
    assert not (tmp_path / "root" / "raw").exists()
    assert len(prefect.flow_runs("pretrain")) == before


def change_variables(prefect: Prefect, deployment: str, variables: dict[str, object]) -> None:
    httpx.patch(f"{prefect.api}/deployments/{deployment}", json={"job_variables": variables}, timeout=30).raise_for_status()
