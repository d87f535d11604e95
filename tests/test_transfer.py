"""Transfers: resumed by range, retried as servers ask, checked, stopped at once, and never half there."""

from __future__ import annotations

import errno
import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tasks import children
from tasks.children import ChildStopped
from tasks.sources import DataError, transfer
from tasks.sources.filesystems import versions_in
from tasks.sources.parallel_jobs import Control, in_parallel
from tasks.sources.transfer import Transfer, fetch_file
from tests.loopback_server import Fault, Hub, Loopback, loopback
from tests.transfer_probe import CUT, DATA, DIGEST, Waits, bring, left, planned, quick_requests


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_requests(tmp_path, monkeypatch, attempts=4)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback() as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files" / "a.bin"


def test_a_file_arrives_whole_with_its_digest(server: Loopback, target: Path) -> None:
    shown: list[int] = []
    with Transfer(Waits(), told=lambda line: None, on_bytes=shown.append) as engine:
        assert engine.bring(planned(server.put("/a.bin", DATA)), target) == (DIGEST, len(DATA))
    assert target.read_bytes() == DATA
    assert left(target) == ["a.bin"]
    assert sum(shown) == len(DATA)
    assert server.gets()[0].headers["accept-encoding"] == "identity"
    assert bring(planned(server.put("/empty", b""), bytes=None, sha256=None), target) == (hashlib.sha256(b"").hexdigest(), 0)


def test_a_cut_connection_is_resumed_where_it_was_cut(server: Loopback, target: Path) -> None:
    url = server.put("/a.bin", DATA, etag='"one"')
    server.faults["/a.bin"] = [Fault(cut=CUT)]
    assert bring(planned(url), target) == (DIGEST, len(DATA))
    first, second = server.gets()
    assert "range" not in first.headers
    assert (second.headers["range"], second.headers["if-range"]) == (f"bytes={CUT}-", '"one"')
    assert server.sent["/a.bin"] == len(DATA)
    assert target.read_bytes() == DATA


def test_a_server_without_ranges_starts_over(server: Loopback, target: Path) -> None:
    url = server.put("/a.bin", DATA, ranges=False)
    server.faults["/a.bin"] = [Fault(cut=CUT)]
    assert bring(planned(url), target)[0] == DIGEST
    assert server.sent["/a.bin"] == CUT + len(DATA)


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server: Loopback, target: Path) -> None:
    url = server.put("/a.bin", DATA, ranges=False)
    server.faults["/a.bin"] = [Fault(cut=CUT)] * 99
    with pytest.raises(DataError, match="in 4 tries; what has arrived is kept"):
        bring(planned(url), target)
    assert len(server.gets()) == 4
    assert left(target) == [".a.bin.part", ".a.bin.part.json"]


def test_a_file_that_is_not_the_planned_one_is_refused(server: Loopback, target: Path) -> None:
    url = server.put("/a.bin", DATA, etag='"two"')
    with pytest.raises(DataError, match=r'/a\.bin changed since the run was planned \(etag:"one" then, etag:"two" now\)'):
        bring(planned(url, sha256=None, version='etag:"one"'), target)
    with pytest.raises(DataError, match=rf"changed since the run was planned \(5 bytes then, {len(DATA)} now\)"):
        bring(planned(url, bytes=5), target)
    url = server.put("/b.bin", DATA, length=False)
    with pytest.raises(DataError, match="sends more than its 5 bytes"):
        bring(planned(url, bytes=5), target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("faults", "waited"),
    [
        ([Fault(status=503), Fault(status=503)], 0.0),
        ([Fault(status=408)], 0.0),
        ([Fault(status=429, headers={"Retry-After": "7"})], 7.0),
        ([Fault(status=503, headers={"Retry-After": "7"})], 7.0),
    ],
)
def test_what_can_pass_is_waited_for(server: Loopback, target: Path, faults: list[Fault], waited: float) -> None:
    server.faults["/a.bin"] = list(faults)
    control = Waits()
    assert bring(planned(server.put("/a.bin", DATA)), target, control)[0] == DIGEST
    assert len(server.gets()) == len(faults) + 1
    assert max(control.seconds) >= waited
    assert max(control.seconds) < waited + 1


def test_a_wait_without_end_is_refused(server: Loopback, target: Path) -> None:
    server.faults["/a.bin"] = [Fault(status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(DataError, match="answered 429 Too Many Requests, and asks to wait 86400 s"):
        bring(planned(server.put("/a.bin", DATA)), target)


@pytest.mark.parametrize(("status", "words"), [(404, "there is no such file"), (403, "user and password"), (400, "correct the URL")])
def test_what_stays_wrong_is_asked_for_exactly_once(server: Loopback, target: Path, status: int, words: str) -> None:
    server.put("/a.bin", DATA)
    server.faults["/a.bin"] = [Fault(status=status)]
    url = f"{server.url}/a.bin?token=secret".replace("//", "//me:secret@")
    with pytest.raises(DataError, match=rf"http://127\.0\.0\.1:\d+/a\.bin answered {status} .*{words}") as refused:
        bring(planned(url), target)
    assert len(server.gets()) == 1
    assert "secret" not in str(refused.value)


def test_a_server_that_is_not_there_is_told_after_the_tries(target: Path) -> None:
    with loopback() as gone:
        url = gone.put("/a.bin", DATA)
    control = Waits()
    with pytest.raises(DataError, match=r"/a\.bin: .*refused.*, in 4 tries"):
        bring(planned(url), target, control)
    assert len(control.seconds) == 3


def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(
    server: Loopback, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
    with loopback() as storage:
        hub = Hub(server, storage)
        hub.gated = True
        hub.put("tokenizer.json", DATA, large=True)
        storage.faults[f"/{DIGEST}"] = [Fault(cut=CUT)]
        fetch_file(f"hf://org/llama@{Hub.COMMIT}/tokenizer.json", target, sha256=DIGEST)
        assert target.read_bytes() == DATA
        assert [asked.headers["authorization"] for asked in hub.asked("resolve")] == [f"Bearer {Hub.TOKEN}"] * 2
        assert [asked.headers.get("range") for asked in storage.requests] == [None, f"bytes={CUT}-"]
        assert not any("authorization" in asked.headers for asked in storage.requests)
        other = storage.put("/other", DATA)
        fetch_file(other, target, sha256=None)
        assert not any("authorization" in asked.headers for asked in storage.requests)


def test_one_file_by_path_or_url(server: Loopback, target: Path, tmp_path: Path) -> None:
    source = tmp_path / "given.bin"
    source.write_bytes(DATA)
    fetch_file(str(source), target, sha256=DIGEST)
    assert target.read_bytes() == DATA
    inode = target.stat().st_ino
    fetch_file(str(source), target, sha256=DIGEST)
    assert target.stat().st_ino == inode
    fetch_file(server.put("/a.bin", DATA), tmp_path / "new" / "b.bin", sha256=None)
    assert (tmp_path / "new" / "b.bin").read_bytes() == DATA
    with pytest.raises(DataError, match=r"given\.bin changed since the run was planned"):
        fetch_file(str(source), tmp_path / "c.bin", sha256="0" * 64)


def test_an_object_is_read_in_ranges_and_resumed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_CHUNK", 1 << 20)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/store/a.bin", DATA)
    file = planned("memory://store/a.bin", sha256=None, version=versions_in(memory.info("/store/a.bin"))[0])
    real, asked = type(memory).cat_file, []

    def flaky(self: Any, path: str, start: int, end: int) -> bytes:
        asked.append(start)
        if len(asked) in (2, 4, 5, 6, 7):
            raise OSError(errno.ECONNRESET, "reset")
        return real(self, path, start, end)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    with pytest.raises(DataError, match=r"memory://store/a\.bin: ConnectionResetError: .*reset.*what has arrived is kept"):
        bring(file, target)
    assert bring(file, target) == (DIGEST, len(DATA) - (2 << 20))
    assert asked == [0, 1 << 20, 1 << 20, 2 << 20, 2 << 20, 2 << 20, 2 << 20, 2 << 20]
    memory.pipe_file("/store/a.bin", DATA[:-1])
    with pytest.raises(DataError, match="changed since the run was planned"):
        bring(file, target)
    memory.rm_file("/store/a.bin")
    with pytest.raises(DataError, match="there is no such file"):
        bring(file, target)


def test_a_killed_download_goes_on_where_it_was(server: Loopback, target: Path) -> None:
    url = server.put("/a.bin", DATA)
    server.faults["/a.bin"] = [Fault(pause=0.05)]
    call = f"fetch_file({url!r}, Path({str(target)!r}), sha256={DIGEST!r})"
    code = f"from pathlib import Path; from tasks.sources.transfer import fetch_file; {call}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    part = target.with_name(".a.bin.part")
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 300_000):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    arrived = part.stat().st_size
    assert 0 < arrived < len(DATA)
    assert not target.exists()
    assert bring(planned(url), target) == (DIGEST, len(DATA) - arrived)
    assert server.gets()[-1].headers["range"] == f"bytes={arrived}-"
    assert left(target) == ["a.bin"]


def test_a_stop_ends_downloads_at_once_also_one_that_hangs(server: Loopback, target: Path) -> None:
    hang = threading.Event()
    server.put("/a.bin", DATA)
    server.faults["/a.bin"] = [Fault(pause=0.05)]
    server.routes = lambda handler, path, query: path == "/hang" and (hang.wait(30) or True)
    control = Control("the download of web")
    files = [planned(f"{server.url}/a.bin"), planned(f"{server.url}/hang")]
    targets = [target, target.with_name("b.bin")]
    threading.Timer(0.3, children.stop_children).start()
    try:
        with Transfer(control, told=lambda line: None, on_bytes=lambda count: None) as engine:
            jobs = [lambda file=file, place=place: engine.bring(file, place) for file, place in zip(files, targets, strict=True)]
            began = time.monotonic()
            with pytest.raises(ChildStopped, match="the download of web was stopped; what has arrived is kept"):
                list(in_parallel(jobs, control, workers=2))
            assert time.monotonic() - began < 10  # and not the 30 s of a silent server
    finally:
        hang.set()
        children.allow_children()
    assert ".a.bin.part" in left(target)
    assert not target.exists()
    assert bring(files[0], target)[0] == DIGEST
