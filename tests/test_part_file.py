"""Files that are arriving: what a later try continues, what checks them, and that nothing is written once it is over."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.children import ChildStopped
from tasks.sources import DataError, SourceFile, part_file
from tasks.sources.parallel_jobs import Control
from tasks.sources.part_file import ContentCheck, PartFile, WrongContent, md5_version
from tasks.storage import StorageError
from tests.loopback_server import Fault, Loopback, loopback
from tests.transfer_probe import CUT, DATA, DIGEST, bring, left, planned, quick_requests


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


def test_a_part_that_was_left_is_continued_by_the_next_run(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for sha256, version in ((DIGEST, None), (None, 'etag:"one"')):
        file = planned(server.put("/a.bin", DATA, etag='"one"'), sha256=sha256, version=version)
        server.faults["/a.bin"] = [Fault(cut=CUT), *[Fault(status=500)] * 3]
        server.requests.clear()
        with pytest.raises(DataError, match=r"/a\.bin answered 500 Internal Server Error, in 4 tries; what has arrived is kept"):
            bring(file, target)
        assert left(target) == [".a.bin.part", ".a.bin.part.json"]
        assert bring(file, target) == (DIGEST, len(DATA) - CUT)
        assert server.gets()[-1].headers["range"] == f"bytes={CUT}-"
        assert target.read_bytes() == DATA
        target.unlink()


def test_a_part_is_not_trusted_across_boots_where_nothing_checks_it(
    server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.put("/a.bin", DATA, etag='"one"')
    for file, kept in ((planned(url), CUT), (planned(url, sha256=None, version='etag:"one"'), 0)):
        server.faults["/a.bin"] = [Fault(cut=CUT), *[Fault(status=500)] * 3]
        with pytest.raises(DataError):
            bring(file, target)
        with monkeypatch.context() as patch:
            patch.setattr(part_file, "_boot", lambda: "another boot")
            assert bring(file, target) == (DIGEST, len(DATA) - kept)


@pytest.mark.parametrize("etags", [('"one"', '"two"'), (None, None), ('W/"one"', 'W/"two"')])
def test_a_file_that_changed_between_tries_starts_over(server: Loopback, target: Path, etags: tuple[str | None, str | None]) -> None:
    other = bytes(reversed(DATA))
    file = planned(server.put("/a.bin", other, etag=etags[0]))
    server.faults["/a.bin"] = [Fault(cut=CUT), *[Fault(status=500)] * 3]
    with pytest.raises(DataError):
        bring(file, target)
    server.put("/a.bin", DATA, etag=etags[1])
    assert bring(file, target)[0] == DIGEST
    assert target.read_bytes() == DATA


def test_a_wrong_digest_is_told_once_and_nothing_is_left(server: Loopback, target: Path) -> None:
    wrong = hashlib.sha256(b"").hexdigest()
    with pytest.raises(WrongContent, match=rf"/a\.bin has the sha256 {DIGEST} where {wrong} was expected"):
        bring(planned(server.put("/a.bin", DATA), sha256=wrong), target)
    assert (len(server.gets()), left(target)) == (1, [])
    with pytest.raises(WrongContent, match=r"has the git-blob digest [0-9a-f]{40} where 00 was listed"):
        bring(planned(f"{server.url}/a.bin", sha256=None, version="git-blob:00"), target)
    assert left(target) == []


def test_a_damaged_part_costs_one_more_download(server: Loopback, target: Path) -> None:
    file = planned(server.put("/a.bin", DATA))
    server.faults["/a.bin"] = [Fault(cut=CUT), *[Fault(status=500)] * 3]
    with pytest.raises(DataError):
        bring(file, target)
    part = target.with_name(".a.bin.part")
    part.write_bytes(b"x" + part.read_bytes()[1:])
    assert bring(file, target)[0] == DIGEST
    part.write_bytes(b"x" * len(DATA))
    target.unlink()
    assert bring(file, target)[0] == DIGEST


def test_a_full_disk_says_how_much_is_needed(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PartFile.__init__

    class Full:
        def __init__(self, handle: Any) -> None:
            self._handle = handle

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._handle, name)

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self._handle = Full(self._handle)

    monkeypatch.setattr(PartFile, "__init__", init)
    with pytest.raises(StorageError, match=rf"no space left while writing .*: {len(DATA):,} bytes are needed, [\d,]+ bytes are free"):
        bring(planned(server.put("/a.bin", DATA)), target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("kind", "digest"),
    [("git-blob", hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()), ("md5", hashlib.md5(DATA).hexdigest())],
)
def test_contents_named_by_other_digests_are_checked_by_them(kind: str, digest: str) -> None:
    check = ContentCheck(SourceFile(name="a", bytes=len(DATA), version=f"{kind}:{digest}"))
    check.update(DATA)
    assert check.check() == hashlib.sha256(DATA).hexdigest()
    check.update(b"more")
    with pytest.raises(WrongContent, match=f"has the {kind} digest"):
        check.check()


def test_nothing_is_written_after_the_end(target: Path) -> None:
    control = Control("x")
    part = PartFile(SourceFile(name="a.bin", bytes=len(DATA), location="http://host/a"), target, control, lambda count: None)
    part.expect(None, len(DATA))
    part.write(b"abc")
    control.cancel()
    for change in (lambda: part.write(b"d"), lambda: part.expect(None, None), part.finish, part.discard):
        with pytest.raises(ChildStopped):
            change()
    assert target.with_name(".a.bin.part").read_bytes() == b"abc"
    part.close()


def test_md5_is_read_in_base64_and_hexadecimal() -> None:
    empty = hashlib.md5(b"").hexdigest()
    assert md5_version("1B2M2Y8AsgTpgAmY7PhCfg==") == md5_version(empty) == f"md5:{empty}"
    assert [md5_version(value) for value in ("", "abcd", "x" * 32, "1B2M2Y8AsgTpgAmY7PhCfg")] == [None] * 4
