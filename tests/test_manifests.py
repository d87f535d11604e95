"""A manifest is JSON of one schema in a regular file, or nothing; files are compared with it by size and by content."""

import json
import os
from pathlib import Path

import pytest

from model.config_base import Config
from tasks import fingerprints, manifests
from tasks.artifacts import ArtifactMissing, commit, open_artifact
from tasks.manifests import check, load_manifest
from tasks.steps import Step


class Reading(Config):
    source: str = "plays"


STEP = Step("raw", "plays", Reading())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with two data files, not yet committed."""
    base = STEP.directory(tmp_path)
    (base / "shard-0").mkdir(parents=True)
    (base / "a.txt").write_bytes(b"alpha")
    (base / "shard-0" / "tokens.bin").write_bytes(b"\1\2\3\4")
    return base


def test_sizes_alone_do_not_see_a_bit_flip_and_hashes_do(directory: Path):
    commit(directory, STEP, stats={})
    (directory / "a.txt").write_bytes(b"alphb")
    assert check(directory, hashes=False) == []
    assert len(check(directory, hashes=True)) == 1


def test_a_bit_flip_with_restored_timestamps_is_seen(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifests, "SETTLED_NANOSECONDS", -1)
    commit(directory, STEP, stats={})
    before = (directory / "a.txt").stat()
    (directory / "a.txt").write_bytes(b"alphb")
    os.utime(directory / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [damage.file for damage in check(directory, hashes=True)] == ["a.txt"]


def test_files_are_hashed_once_in_a_process_unless_they_are_too_young(directory: Path, monkeypatch: pytest.MonkeyPatch):
    reads: list[str] = []
    real = fingerprints.file_digest
    monkeypatch.setattr(fingerprints, "file_digest", lambda path, algorithm: (reads.append(Path(path).name), real(path, algorithm))[1])
    commit(directory, STEP, stats={})
    open_artifact(directory, STEP.fingerprint)
    assert len(reads) == 4, "files younger than the clock's tick are read again"
    monkeypatch.setattr(manifests, "SETTLED_NANOSECONDS", -1)
    reads.clear()
    open_artifact(directory, STEP.fingerprint)
    open_artifact(directory, STEP.fingerprint)
    assert sorted(reads) == ["a.txt", "tokens.bin"]


def edited(**changes):
    def edit(data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **changes}).encode()

    return edit


GOOD = {"bytes": 5, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[: len(data) // 2], "is not JSON"),
        (lambda data: b"\x80\x04\x95garbage.", "is not JSON"),
        (lambda data: b"[" * 200_000, "is not JSON"),
        (lambda data: b"[]", "is not a manifest"),
        (edited(schema=2), "is not a manifest of schema 1: schema"),
        (edited(extra=1), "is not a manifest of schema 1: extra"),
        (edited(config={"source": "novels"}), "the fingerprint is not that of its"),
        (edited(name="novels"), "the fingerprint is not that of its"),
        (edited(files=[{"path": "../../x", **GOOD}]), "leaves the artifact's directory"),
        (edited(files=[{"path": "/etc/passwd", **GOOD}]), "leaves the artifact's directory"),
        (edited(files=[{"path": "a\0b", **GOOD}]), "leaves the artifact's directory"),
        (edited(files=[{"path": "", **GOOD}]), "leaves the artifact's directory"),
        (edited(files=[{"path": "a", "bytes": "5", "sha256": "0" * 64}]), "bytes"),
    ],
)
def test_a_manifest_that_is_not_right_is_none_at_all(directory: Path, edit, reason: str):
    commit(directory, STEP, stats={})
    path = directory / "manifest.json"
    path.write_bytes(edit(path.read_bytes()))
    manifest, why = load_manifest(directory)
    assert manifest is None
    assert reason in why
    with pytest.raises(ArtifactMissing, match=r"manifest\.json is"):
        open_artifact(directory, STEP.fingerprint)


def test_a_manifest_is_a_regular_file_of_reasonable_size(directory: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_manifest(directory) == (None, "is missing")
    assert load_manifest(directory / "a.txt") == (None, "is missing")
    os.mkfifo(directory / "manifest.json")
    assert "not a regular file" in load_manifest(directory)[1]
    (directory / "manifest.json").unlink()
    commit(directory, STEP, stats={})
    monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", 100)
    assert "more than the 100" in load_manifest(directory)[1]
