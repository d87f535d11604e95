"""The log of a host in the run's bucket: it grows by pieces, whole and once, whatever answers get lost; secrets are not in it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.tpu import host_agent, host_log
from deployments.tpu.emulator.metadata import MetadataServer
from deployments.tpu.host_log import BucketLog, HostLog
from tests.host_boot import boot, launch
from tests.object_store import BUCKET, faulty_proxy, object_store

URL = f"gs://{BUCKET}/root/logs/run/1/host-1.log"
NAME = "root/logs/run/1/host-1.log"


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture(autouse=True)
def empty(store: str) -> None:
    for name in names(store):
        httpx.delete(f"{store}/storage/v1/b/{BUCKET}/o/{name.replace('/', '%2F')}").raise_for_status()


def names(store: str) -> list[str]:
    return [item["name"] for item in httpx.get(f"{store}/storage/v1/b/{BUCKET}/o").json().get("items", ())]


def content(store: str) -> bytes:
    answer = httpx.get(f"{store}/storage/v1/b/{BUCKET}/o/{NAME.replace('/', '%2F')}", params={"alt": "media"})
    return answer.content if answer.status_code == 200 else b""


def log_in(address: str, monkeypatch: pytest.MonkeyPatch) -> BucketLog:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    return BucketLog(lambda: "emulated", URL)


def append_all(log: BucketLog, text: bytes, tries: int = 20) -> None:
    for _ in range(tries):
        if not text:
            return
        try:
            text = text[log.append(text) :]
        except OSError:
            continue
    raise AssertionError(f"not written after {tries} tries: {text!r}")


def test_it_grows_and_an_earlier_boots_stays(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append_all(log_in(store, monkeypatch), b"of the first boot\n")
    log = log_in(store, monkeypatch)
    for piece in (b"one\n", b"two\n", b"three\n"):
        append_all(log, piece)
    log.end()
    assert content(store) == b"of the first boot\none\ntwo\nthree\n"
    assert names(store) == [NAME]


@pytest.mark.parametrize("fault", ["lost", "reset", 503, 429])
def test_every_piece_is_there_once(store: str, monkeypatch: pytest.MonkeyPatch, fault: int | str) -> None:
    count = 0

    def every_fourth(method: str, path: str) -> int | str | None:  # a piece takes three
        nonlocal count
        count += 1
        return fault if count % 4 == 0 else None

    with faulty_proxy(store, every_fourth) as proxy:
        log = log_in(proxy.url, monkeypatch)
        for index in range(6):
            append_all(log, b"piece %d\n" % index)
        assert proxy.seen[fault] >= 4
    assert content(store) == b"".join(b"piece %d\n" % index for index in range(6))


def test_secrets_are_hidden_in_both(store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log = HostLog()
    log.bucket = log_in(store, monkeypatch)
    log.hide(["canary-of-tests\n", "true", "-----BEGIN\nfirst-line-of-two\nsecond-line-of-two"])
    log.follow(io.BytesIO(b"key=canary-of-tests ok=true\n<first-line-of-two>\nsecond-line-of-two\n"))
    log.close()
    assert content(store) == b"key=[hidden] ok=true\n<[hidden]>\n[hidden]\n"
    assert capsys.readouterr().out == content(store).decode()


def test_a_bucket_that_refuses_is_told_once_and_ends_nothing(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_log, "TRIES", 2)
    with faulty_proxy(store, lambda *_: 403) as proxy:
        log = HostLog()
        log.bucket = log_in(proxy.url, monkeypatch)
        log.follow(io.BytesIO(b"a line\n"))
        log.close()
    said = capsys.readouterr().out
    assert said.count(f"cannot write {URL} (HTTP Error 403") == 1
    assert "give the slice's service account the bucket" in said
    assert content(store) == b""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], MetadataServer]]:
    servers: list[MetadataServer] = []

    def make(told: dict[str, Any]) -> MetadataServer:
        attributes = {
            "agent-worker-number": "1",
            "worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2",
            "enable-guest-attributes": "TRUE",
            host_agent.LAUNCH: json.dumps(told),
        }
        servers.append(MetadataServer(lambda: attributes, project="p", zone="z"))
        monkeypatch.setenv("GCE_METADATA_HOST", servers[0].address)
        return servers[0]

    yield make
    for server in servers:
        server.close()


def test_what_a_host_says_is_in_the_bucket_while_it_runs_and_after(
    store: str, host: Callable[[dict[str, Any]], MetadataServer], tmp_path: Path
) -> None:
    goes_on = tmp_path / "goes-on"
    command = (
        "import pathlib, sys, time\nprint('begun', flush=True)\n"
        f"while not pathlib.Path({str(goes_on)!r}).exists(): time.sleep(0.05)\n"
        "print('ended', file=sys.stderr); sys.exit(3)"
    )
    host(launch(command, logs=f"gs://{BUCKET}/root/logs/run/1"))
    # the pause between pieces is a constant of the script: a host that is tested waits less
    script = "PIECE_SECONDS = 30.0"
    process = boot(tmp_path, replaced=(script, "PIECE_SECONDS = 0.2"), STORAGE_EMULATOR_HOST=store)
    deadline = time.monotonic() + 60
    while b"begun" not in content(store):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    goes_on.touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert content(store).decode() == output
    assert output.splitlines()[-2:] == ["begun", "ended"]
    assert names(store) == [NAME]


def test_why_a_host_could_not_begin_is_in_the_bucket_too(
    store: str, host: Callable[[dict[str, Any]], MetadataServer], tmp_path: Path
) -> None:
    host(launch("pass", logs=f"gs://{BUCKET}/root/logs/run/1", directory=str(tmp_path / "nowhere")))
    output, _ = boot(tmp_path, STORAGE_EMULATOR_HOST=store).communicate(timeout=60)
    assert "nowhere" in output
    assert "error: " in content(store).decode()
