"""The download step: content proven, resumable by file, provenance kept, hostile names refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model import durable
from tasks import download as module
from tasks.artifacts import check, commit
from tasks.data_steps import RawFiles, mixture_steps
from tasks.datasets import DataError, Mixture
from tasks.download import download_body, naming_originals, raw_files
from tasks.sources import SourceFile
from tasks.steps import Step


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"text of {name}\n" * 1000, encoding="utf-8")
    return directory


def step_of(source: Path) -> Step:
    dataset = {"name": "web", "source": str(source / "**" / "*.txt"), "revision": "v7"}
    return mixture_steps(Mixture.model_validate({"name": "m", "datasets": (dataset,), "weights": {"web": 1.0}})).downloads[0]


def test_copies_every_file_with_its_provenance(tmp_path: Path, source: Path) -> None:
    step, directory = step_of(source), tmp_path / "raw"
    directory.mkdir()
    stats = download_body(step, directory, ())
    assert stats == {"files": 3, "bytes": sum(path.stat().st_size for path in source.rglob("*.txt")), "files_kept": 0}
    assert isinstance(step.config, RawFiles)
    for copy, path in zip(raw_files(directory, step.config), step.config.paths, strict=True):
        assert copy.read_bytes() == Path(path).read_bytes()
    record = json.loads((directory / "provenance.json").read_text(encoding="utf-8"))
    assert (record["dataset"], record["revision"]) == ("web", "v7")
    assert [file["name"] for file in record["files"]] == ["a.txt", "b.txt", "sub/c.txt"]
    assert record["files"][2]["source"] == str(source / "sub" / "c.txt")
    assert len(record["files"][0]["sha256"]) == 64
    assert record["retrieved"].startswith("20")
    commit(directory, step, stats=stats)
    assert check(directory, step.fingerprint, hashes=True) == []


def test_goes_on_where_it_was_interrupted_and_cleans_up(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, directory = step_of(source), tmp_path / "raw"
    (directory / "files" / "sub").mkdir(parents=True)
    real, copied = module._copy, []

    def interrupted(dataset: str, file: SourceFile, path: Path, target: Path) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(file.name)
        real(dataset, file, path, target)

    monkeypatch.setattr(module, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_body(step, directory, ())
    monkeypatch.setattr(module, "_copy", real)
    files = directory / "files"
    (files / "b.txt").write_bytes(b"half of it")
    (files / "sub" / ".c.txt.12-ab.tmp").write_bytes(b"what kill -9 leaves")
    (files / "stray.txt").write_bytes(b"no file of this dataset")
    assert download_body(step, directory, ())["files_kept"] == 1
    assert sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()) == ["a.txt", "b.txt", "sub/c.txt"]
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert download_body(step, directory, ())["files_kept"] == 3
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_damaged_copy_is_replaced(tmp_path: Path, source: Path) -> None:
    step, directory = step_of(source), tmp_path / "raw"
    directory.mkdir()
    download_body(step, directory, ())
    copy = directory / "files" / "a.txt"
    data = bytearray(copy.read_bytes())
    data[5] ^= 1
    copy.write_bytes(data)
    assert download_body(step, directory, ())["files_kept"] == 2
    assert copy.read_bytes() == (source / "a.txt").read_bytes()


def test_a_source_that_changed_or_vanished_since_the_plan_is_refused(tmp_path: Path, source: Path) -> None:
    step, directory = step_of(source), tmp_path / "raw"
    directory.mkdir()
    (source / "a.txt").write_text("other", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt changed since the run was planned \(14000 bytes then, 5 now\)"):
        download_body(step, directory, ())
    assert not list((directory / "files").iterdir())
    (source / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(No such file or directory\); put it back"):
        download_body(step, directory, ())


def test_names_that_leave_the_directory_are_refused(tmp_path: Path, source: Path) -> None:
    good = step_of(source).config
    assert isinstance(good, RawFiles)
    for name in ("../escape.txt", "/etc/escape.txt", "a/../../escape.txt"):
        bad = good.model_copy(update={"files": (good.files[0].model_copy(update={"name": name}),), "paths": good.paths[:1]})
        with pytest.raises(DataError, match="cannot be used below a directory of ours"):
            download_body(Step("raw", "web", bad), tmp_path / "raw", ())
    with pytest.raises(DataError, match="3 files are planned and 0 paths given"):
        download_body(Step("raw", "web", good.model_copy(update={"paths": ()})), tmp_path / "raw", ())
    assert not list(tmp_path.rglob("escape.txt"))


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
    config = RawFiles(files=(), paths=("/mine/a.txt", "/mine/b.txt"))
    with (
        pytest.raises(DataError, match=r"^/mine/b.txt line 2: bad; mend it$"),
        naming_originals([Path("/root/raw/x/files/a.txt"), Path("/root/raw/x/files/b.txt")], config),
    ):
        raise DataError("/root/raw/x/files/b.txt line 2: bad; mend it")
