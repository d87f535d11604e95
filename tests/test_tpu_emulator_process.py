"""The emulator as a process of a directory: one of them, found, replaced, and ending by itself."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deployments.tpu.emulator import address
from deployments.tpu.emulator.address import running_emulator
from deployments.tpu.emulator.cloud import Cloud
from deployments.tpu.emulator.control import Control, order
from deployments.tpu.emulator.fulfilment import Supply
from deployments.tpu.emulator.service import Service
from tests.simulated_slices import (
    CHECKOUT,
    State,
    asked,
    connected,
    lives,
    made_clouds,
    node_of,
    processes,
    queued,
    reached,
    said,
)


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes clouds that are gone, with their hosts, when the test ends."""
    with made_clouds(tmp_path) as make:
        yield make


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory whose emulator, should there be one, is ended."""
    yield tmp_path
    written = tmp_path / "emulator.json"
    if written.exists():
        process = json.loads(written.read_text())["pid"]
        if lives(process):
            os.kill(process, signal.SIGKILL)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_emulator_of_a_directory_that_dies_with_its_hosts_and_is_replaced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Path] = []
    start = address._start
    monkeypatch.setattr(address, "_start", lambda place, options: (starts.append(place), start(place, options))[1])
    with ThreadPoolExecutor(2) as threads:
        addresses = set(threads.map(lambda _: running_emulator(directory), range(2)))
    assert (len(addresses), starts) == (1, [directory])
    written = json.loads((directory / "emulator.json").read_text())

    async def test() -> list[list[int]]:
        async with connected(written["address"]) as client, asyncio.timeout(60):
            await client.create_queued_resource(asked())
            await reached(client, State.ACTIVE)
            running = await processes(client)
            with pytest.raises(ValueError, match="NOT_FOUND"):
                order(written["control"], "preempt", name=queued("other"), grace=0)
            with pytest.raises(ValueError, match="order='destroy'"):
                order(written["control"], "destroy")
            with pytest.raises(ValueError, match="grace"):
                order(written["control"], "preempt", name=queued())
            order(written["control"], "reboot", name=queued(), grace=0)
            await said(client, "boots", "2")
            assert not any(lives(process) for host in running for process in host)
            return await processes(client)

    running = asyncio.run(test())
    os.kill(written["pid"], signal.SIGKILL)
    until(lambda: not any(lives(process) for host in running for process in host))
    assert running_emulator(directory) != written["address"]
    again = json.loads((directory / "emulator.json").read_text())
    assert again["pid"] != written["pid"]

    async def start_another() -> None:
        async with connected(again["address"]) as client, asyncio.timeout(60):
            await client.create_queued_resource(asked("other", accelerator_type="v4-8"))
            await reached(client, State.ACTIVE, queued("other"))
            await processes(client, node_of("other-node"))

    asyncio.run(start_another())
    os.kill(again["pid"], signal.SIGTERM)
    until(lambda: not lives(again["pid"]))
    assert not (directory / "emulator.json").exists()
    assert (directory / "other-node-w0.log").read_text() == "boot 1\ntold to end\n"
    assert not list((directory / "disks").iterdir())  # those of the killed one too
    assert f"{queued('other')} is ACTIVE" in (directory / "emulator.log").read_text()


def test_a_service_with_queued_resources_or_requests_is_not_idle(clouds: Callable[..., Service]) -> None:
    service = clouds(Supply(capacity=0))
    assert not service.is_idle(60.0)
    assert service.is_idle(0.0)
    service.cloud.create(asked())
    assert not service.is_idle(0.0)


def test_an_emulator_that_nobody_needs_ends(directory: Path) -> None:
    running_emulator(directory, options=["--idle-seconds", "2"])
    process = json.loads((directory / "emulator.json").read_text())["pid"]
    until(lambda: not lives(process))
    assert "no queued resource" in (directory / "emulator.log").read_text()


class Started(Exception):
    """An emulator would have been started."""


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(address, "_start", start)
    monkeypatch.setattr(address, "_PATIENCE", 0.2)


@pytest.mark.usefixtures("no_start")
def test_none_is_started_beside_one_that_lives_and_does_not_answer(tmp_path: Path) -> None:
    with (tmp_path / "emulator.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="did not come up"):
            running_emulator(tmp_path)


@pytest.mark.usefixtures("no_start")
def test_only_the_emulator_that_wrote_the_address_is_taken_for_it(tmp_path: Path) -> None:
    told: dict[str, Any] = {"pid": 7, "directory": str(tmp_path), "ends": False}
    control = Control(Cloud(tmp_path), lambda: told)
    written = tmp_path / "emulator.json"
    written.write_text(json.dumps({"address": "127.0.0.1:1", "control": control.address, "pid": 7}))
    try:
        assert running_emulator(tmp_path) == "127.0.0.1:1"
        for field, value in (("pid", 8), ("directory", "/other"), ("ends", True)):
            told[field], before = value, told[field]
            with pytest.raises(Started):
                running_emulator(tmp_path)
            told[field] = before
        written.write_text("{")
        with pytest.raises(Started):
            running_emulator(tmp_path)
    finally:
        control.close()


def test_an_emulator_that_does_not_come_up_is_told_with_its_log(directory: Path) -> None:
    with pytest.raises(RuntimeError, match="invalid int value: 'x'"):
        running_emulator(directory, options=["--port", "x"])


def test_the_module_a_worker_imports_is_light() -> None:
    code = "import sys; import deployments.tpu.emulator.address; print({'grpc', 'google', 'jax', 'prefect'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
