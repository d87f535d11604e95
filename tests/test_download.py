"""The download step: content proven, resumable by file and byte, provenance kept, hostile names refused."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model import durable
from tasks import download as module
from tasks.artifacts import check, commit
from tasks.data_steps import RawFiles
from tasks.download import download_body, naming_originals, raw_files
from tasks.mixture_config import Dataset
from tasks.sources import DataError, SourceFile, list_files
from tasks.sources.transfer import Transfer
from tasks.steps import Step
from tasks.storage import StorageError
from tests.loopback_server import Fault, Hub, Loopback, loopback
from tests.transfer_probe import quick_requests


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_requests(tmp_path, monkeypatch, attempts=3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"text of {name}\n" * 1000, encoding="utf-8")
    return directory


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback() as running:
        yield running


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "raw"
    made.mkdir()
    return made


def step_of(*sources: object, **changes: Any) -> Step:
    dataset = Dataset(**{"name": "web", "source": tuple(map(str, sources)), "revision": "v7", **changes})
    config = RawFiles(files=list_files(dataset), revision=dataset.revision, licence=dataset.licence, homepage=dataset.homepage)
    return Step(kind="raw", name="web", config=config)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_copies_every_file_with_its_provenance(source: Path, directory: Path) -> None:
    step = step_of(source / "**" / "*.txt", licence="CC0-1.0", homepage="https://example.org")
    size = sum(path.stat().st_size for path in source.rglob("*.txt"))
    stats = download_body(step, directory, ())
    assert stats == {"files": 3, "bytes": size, "files_kept": 0, "bytes_fetched": size}
    assert isinstance(step.config, RawFiles)
    for copy, file in zip(raw_files(directory, step.config), step.config.files, strict=True):
        assert copy.read_bytes() == Path(file.location).read_bytes()
    record = json.loads((directory / "provenance.json").read_text(encoding="utf-8"))
    assert {name: record[name] for name in ("dataset", "revision", "licence", "homepage")} == {
        "dataset": "web", "revision": "v7", "licence": "CC0-1.0", "homepage": "https://example.org",
    }  # fmt: skip
    assert [file["name"] for file in record["files"]] == ["a.txt", "b.txt", "sub/c.txt"]
    assert record["files"][2]["source"] == str(source / "sub" / "c.txt")
    assert record["files"][2]["sha256"] == hashlib.sha256((source / "sub" / "c.txt").read_bytes()).hexdigest()
    assert all(file["retrieved"].startswith("20") for file in record["files"])
    commit(directory, step, stats=stats)
    assert check(directory, step.fingerprint, hashes=True) == []


def test_goes_on_where_it_was_interrupted_and_cleans_up(source: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, files = step_of(source / "**" / "*.txt"), directory / "files"
    real, copied = Transfer.bring, []

    def interrupted(self: Transfer, file: SourceFile, target: Path) -> tuple[str, int]:
        if copied:
            raise KeyboardInterrupt
        copied.append(file.name)
        return real(self, file, target)

    with monkeypatch.context() as patch:
        patch.setattr(module, "WORKERS", 1)
        patch.setattr(Transfer, "bring", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_body(step, directory, ())
    (files / "b.txt").write_bytes(b"half of it")
    (files / "sub" / ".c.txt.12-ab.tmp").write_bytes(b"what kill -9 leaves")
    (files / ".old.txt.part").write_bytes(b"of another plan")
    (files / "stray.txt").write_bytes(b"no file of this dataset")
    assert download_body(step, directory, ())["files_kept"] == 1
    assert list(contents(directory)) == ["files/a.txt", "files/b.txt", "files/sub/c.txt", "provenance.json"]
    before = contents(directory)
    assert download_body(step, directory, ())["files_kept"] == 3
    assert contents(directory) == before


def test_a_damaged_copy_is_replaced(source: Path, directory: Path) -> None:
    step = step_of(source / "**" / "*.txt")
    download_body(step, directory, ())
    copy = directory / "files" / "a.txt"
    data = bytearray(copy.read_bytes())
    data[5] ^= 1
    copy.write_bytes(data)
    assert download_body(step, directory, ())["files_kept"] == 2
    assert copy.read_bytes() == (source / "a.txt").read_bytes()


def test_a_source_that_changed_or_vanished_since_the_plan_is_refused(source: Path, directory: Path) -> None:
    step = step_of(source / "a.txt")
    (source / "a.txt").write_text("other", encoding="utf-8")
    with pytest.raises(DataError, match=r"^dataset 'web': .*a\.txt changed since the run was planned \(14000 bytes then, 5 now\)"):
        download_body(step, directory, ())
    assert not list((directory / "files").iterdir())
    (source / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(No such file or directory\); put it back"):
        download_body(step, directory, ())


def test_names_that_leave_the_directory_are_refused(tmp_path: Path, source: Path, directory: Path) -> None:
    good = step_of(source / "a.txt").config
    assert isinstance(good, RawFiles)
    for name in ("../escape.txt", "/etc/escape.txt", "a/../../escape.txt"):
        bad = good.model_copy(update={"files": (good.files[0].model_copy(update={"name": name}),)})
        with pytest.raises(DataError, match="cannot be used below a directory of ours"):
            download_body(Step("raw", "web", bad), directory, ())
    assert not list(tmp_path.rglob("escape.txt"))


def test_remote_files_of_every_kind_arrive_together(
    server: Loopback, source: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with loopback() as storage, loopback() as other:
        hub = Hub(server, storage)
        hub.put("data/small.jsonl", b'{"text": "small"}\n')
        hub.put("data/large.jsonl", b'{"text": "large"}\n' * 1000, large=True)
        fsspec.filesystem("memory").pipe_file("/kept/d.txt", b"in memory\n")
        monkeypatch.setenv("PASSWORD", "secret")
        url = other.put("/e.txt", b"by http\n").replace("//", "//me:${PASSWORD}@") + "?sig=${PASSWORD}"
        server.faults["/datasets/org/web/resolve/" + Hub.COMMIT + "/data/small.jsonl"] = [Fault(status=503)]
        step = step_of(f"hf://datasets/org/web@{Hub.COMMIT}/data/*", "memory://kept/*.txt", url, source / "a.txt")
        stats = download_body(step, directory, ())
        assert (stats["files"], stats["files_kept"]) == (5, 0)
        assert stats["bytes"] == stats["bytes_fetched"]
        files = directory / "files"
        assert (files / "000" / "large.jsonl").read_bytes() == hub.files["data/large.jsonl"]
        assert (files / "000" / "small.jsonl").read_bytes() == hub.files["data/small.jsonl"]
        assert (files / "001" / "d.txt").read_bytes() == b"in memory\n"
        assert (files / "002" / "e.txt").read_bytes() == b"by http\n"
        record = (directory / "provenance.json").read_text(encoding="utf-8")
        assert "secret" not in record
        entry = json.loads(record)["files"][1]
        assert entry["source"] == f"{server.url}/datasets/org/web/resolve/{Hub.COMMIT}/data/small.jsonl"
        assert entry["sha256"] == hashlib.sha256(hub.files["data/small.jsonl"]).hexdigest()
        assert entry["version"].startswith("git-blob:")
        commit(directory, step, stats=stats)
        assert "secret" not in (directory / "manifest.json").read_text(encoding="utf-8")
        before = contents(directory)
        server.requests.clear()
        again = download_body(step, directory, ())
        assert (again["files_kept"], again["bytes_fetched"], server.requests) == (5, 0, [])
        assert contents(directory) == before


def test_what_came_before_a_failure_is_kept_by_the_ledger(server: Loopback, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKERS", 1)
    urls = [server.put(f"/{name}.txt", f"text of {name}\n".encode()) for name in "abc"]
    step = step_of(*urls)
    server.faults["/c.txt"] = [Fault(status=404)]
    with pytest.raises(DataError, match=r"^dataset 'web': .*/c\.txt answered 404 Not Found: there is no such file"):
        download_body(step, directory, ())
    with (directory / ".fetched.jsonl").open("a", encoding="utf-8") as ledger:
        ledger.write('{"name": "002/c.t')
    (directory / "files" / "001" / "b.txt").write_bytes(b"damaged \n" * 2)
    assert download_body(step, directory, ())["files_kept"] == 1
    assert [len(server.gets(f"/{name}.txt")) for name in "abc"] == [1, 2, 2]
    assert (directory / "files" / "001" / "b.txt").read_bytes() == b"text of b\n"
    assert not (directory / ".fetched.jsonl").exists()


def test_a_published_digest_decides(server: Loopback, directory: Path) -> None:
    url, digest = server.put("/a.txt", b"published\n"), hashlib.sha256(b"published\n").hexdigest()
    download_body(step_of(url, sha256={"a.txt": digest}), directory, ())
    with pytest.raises(DataError, match=rf"dataset 'web': .*/a\.txt has the sha256 {digest} where {'0' * 64} was expected"):
        download_body(step_of(url, sha256={"a.txt": "0" * 64}), directory, ())


def test_too_little_space_is_said_before_it_starts(server: Loopback, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(server.put("/a.txt", b"x" * 5000), server.put("/b.txt", b"y" * 5000))
    monkeypatch.setattr(module, "free_bytes", lambda path: 7000)
    (directory / "files" / "000").mkdir(parents=True)
    server.requests.clear()
    with pytest.raises(StorageError, match=r"dataset 'web': its files need 10,000 more bytes in .*, and 7,000 are free"):
        download_body(step, directory, ())
    assert server.requests == []
    (directory / "files" / "000" / ".a.txt.part").write_bytes(b"x" * 4000)
    assert download_body(step, directory, ())["files"] == 2


def test_a_killed_step_loses_nothing_that_arrived(server: Loopback, directory: Path) -> None:
    small, large = b"small\n", random.Random(1).randbytes(3 << 20)
    step = step_of(server.put("/small.txt", small), server.put("/large.txt", large))
    server.faults["/large.txt"] = [Fault(pause=0.05)]
    assert isinstance(step.config, RawFiles)
    code = (
        "import json, sys; from pathlib import Path; from tasks.data_steps import RawFiles; from tasks.steps import Step; "
        "from tasks.download import download_body; config = RawFiles.model_validate_json(sys.argv[1]); "
        "download_body(Step('raw', 'web', config), Path(sys.argv[2]), ())"
    )
    arguments = [sys.executable, "-c", code, step.config.model_dump_json(), str(directory)]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parent.parent)
    part = directory / "files" / "001" / ".large.txt.part"
    until = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size > 300_000):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    arrived = part.stat().st_size
    stats = download_body(step, directory, ())
    assert (stats["files_kept"], stats["bytes_fetched"]) == (1, len(large) - arrived)
    assert [len(server.gets(f"/{name}.txt")) for name in ("small", "large")] == [1, 2]
    assert contents(directory / "files") == {"000/small.txt": small, "001/large.txt": large}


def half_written(path: Path) -> None:
    with durable.durable_file(path) as file:
        file.write(b"half")
        raise RuntimeError("stop")


def test_a_durable_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(RuntimeError, match="stop"):
        half_written(path)
    assert list(tmp_path.iterdir()) == []
    durable.write_json(path, {"b": 1, "a": [2.5]})
    assert json.loads(path.read_bytes()) == {"a": [2.5], "b": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_errors_about_a_copy_name_the_file_it_came_from() -> None:
    files = (
        SourceFile(name="a.txt", location="/mine/a.txt"),
        SourceFile(name="b.txt", location="https://me:secret@host/b.txt?sig=secret"),
        SourceFile(name="c.txt"),
    )
    copies = [Path(f"/root/raw/x/files/{name}.txt") for name in "abc"]
    for copy, words in zip(copies, ("^/mine/a.txt line 2", "^https://host/b.txt line 2", "^/root/raw/x/files/c.txt line 2"), strict=True):
        with pytest.raises(DataError, match=words), naming_originals(copies, RawFiles(files=files)):
            raise DataError(f"{copy} line 2: bad; mend it")
