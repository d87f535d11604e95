"""Artifacts exist through a manifest written last; damage is named, never used; full and read-only disks are told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.config_base import Config
from tasks import artifacts, fingerprints, local_artifact, storage
from tasks.artifacts import (
    Artifact,
    ArtifactDamaged,
    ArtifactError,
    ArtifactMissing,
    check,
    commit,
    discard_damaged,
    discard_manifest,
    empty_directory,
    list_files,
    open_artifact,
    read_manifest,
)
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


def test_commit_states_every_file_and_opens_again(directory: Path):
    artifact = commit(directory, STEP, stats={"tokens": 4})
    assert artifact == Artifact(kind="raw", name="plays", path=str(directory), fingerprint=STEP.fingerprint)
    manifest = read_manifest(directory)
    assert manifest is not None
    assert [(entry.path, entry.bytes) for entry in manifest.files] == [("a.txt", 5), ("shard-0/tokens.bin", 4)]
    assert manifest.files[0].sha256 == fingerprints.file_digest(directory / "a.txt")
    assert (manifest.kind, manifest.name, manifest.fingerprint) == ("raw", "plays", STEP.fingerprint)
    assert (manifest.config, manifest.stats, manifest.upstream) == ({"source": "plays"}, {"tokens": 4}, [])
    assert open_artifact(directory, STEP.fingerprint) == artifact


def test_the_manifest_has_the_documented_keys_and_equal_work_leaves_equal_bytes(directory: Path):
    commit(directory, STEP, stats={"tokens": 4})
    first = (directory / "manifest.json").read_bytes()
    keys = ["schema", "kind", "name", "fingerprint", "config", "upstream", "code_version", "files", "stats", "created_by"]
    assert list(json.loads(first)) == keys
    commit(directory, STEP, stats={"tokens": 4})
    assert (directory / "manifest.json").read_bytes() == first


def test_the_manifest_is_written_last(directory: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    for name in ("sync_file", "sync_directory"):
        real = getattr(storage, name)
        for module in (artifacts, local_artifact):
            patched = lambda path, real=real, name=name: (events.append(f"{name} {Path(path).name}"), real(path))  # noqa: E731
            monkeypatch.setattr(module, name, patched, raising=False)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"rename {Path(new).name}"), replace(old, new)))
    commit(directory, STEP, stats={}, still_owner=lambda: events.append("still owner?"))
    rename = events.index("rename manifest.json")
    assert events[rename - 1] == "still owner?"
    assert {"sync_file a.txt", "sync_file tokens.bin", "sync_directory shard-0"} <= set(events[:rename])
    assert events[rename + 1] == f"sync_directory {directory.name}"


def test_an_owner_that_lost_the_step_commits_nothing(directory: Path):
    def lost() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        commit(directory, STEP, stats={}, still_owner=lost)
    assert sorted(path.name for path in directory.iterdir()) == ["a.txt", "shard-0"]


def test_hidden_files_and_directories_with_their_own_manifest_are_left_out(directory: Path):
    export = Step("hf", "plays", Reading(), subdirectory_of=STEP)
    (directory / "hf").mkdir()
    (directory / "hf" / "model.safetensors").write_bytes(b"w")
    commit(directory / "hf", export, stats={})
    (directory / ".job.json").write_text("{}")
    (directory / ".tmp-left-by-a-kill").write_text("")
    assert list(list_files(directory)) == ["a.txt", "shard-0/tokens.bin"]
    assert [entry.path for entry in commit_and_read(directory).files] == ["a.txt", "shard-0/tokens.bin"]


def commit_and_read(directory: Path, **options):
    commit(directory, STEP, stats={}, **options)
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest


def test_chosen_files_may_be_relative_or_absolute(directory: Path):
    manifest = commit_and_read(directory, files=["shard-0/tokens.bin", directory / "a.txt", "a.txt"])
    assert [entry.path for entry in manifest.files] == ["a.txt", "shard-0/tokens.bin"]


@pytest.mark.parametrize("file", ["../outside", "/etc/hostname", "shard-0/../../outside", "linked/outside", "link"])
def test_files_outside_are_refused(directory: Path, file: str):
    (directory.parent / "outside").write_text("x")
    (directory / "linked").symlink_to(directory.parent)
    (directory / "link").symlink_to(directory.parent / "outside")
    with pytest.raises(ArtifactError, match=r"is not inside"):
        commit(directory, STEP, files=[file], stats={})
    assert read_manifest(directory) is None


@pytest.mark.parametrize("make", ["link", "fifo"])
def test_links_and_special_files_are_refused(directory: Path, make: str):
    if make == "link":
        (directory / "x").symlink_to("a.txt")
    else:
        os.mkfifo(directory / "x")
    with pytest.raises(ArtifactError, match="link or a special file"):
        commit(directory, STEP, stats={})


def test_stats_that_are_no_json_fail_before_anything_is_hashed(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artifacts, "digest_once", lambda path: pytest.fail("hashed"))
    with pytest.raises(TypeError, match=r"stats\.x"):
        commit(directory, STEP, stats={"x": object()})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda base: (base / "a.txt").unlink(), "a.txt is missing"),
        (lambda base: (base / "a.txt").write_bytes(b""), "a.txt has 0 bytes instead of 5"),
        (lambda base: os.truncate(base / "shard-0" / "tokens.bin", 3), "shard-0/tokens.bin has 3 bytes instead of 4"),
        (lambda base: (base / "a.txt").write_bytes(b"alphb"), "a.txt has other contents"),
        (lambda base: ((base / "a.txt").rename(base / "b"), (base / "a.txt").symlink_to("b")), "a.txt is not a regular file"),
        (lambda base: ((base / "shard-0").rename(base / "s"), (base / "shard-0").symlink_to("s")), "shard-0/tokens.bin is not a regular"),
    ],
    ids=["deleted", "emptied", "truncated", "bit flip", "link", "linked directory"],
)
def test_damage_is_named_and_refused(directory: Path, damage, named: str):
    commit(directory, STEP, stats={})
    open_artifact(directory, STEP.fingerprint)
    damage(directory)
    with pytest.raises(ArtifactDamaged, match="rebuilds this step") as raised:
        open_artifact(directory, STEP.fingerprint)
    assert named in str(raised.value)
    assert any(str(found).startswith(named) for found in check(directory, STEP.fingerprint, hashes=True))


def test_another_fingerprint_is_missing(directory: Path):
    commit(directory, STEP, stats={})
    other = Step("raw", "plays", Reading(source="novels")).fingerprint
    with pytest.raises(ArtifactMissing, match=STEP.fingerprint[:16]):
        open_artifact(directory, other)
    assert [damage.file for damage in check(directory, other, hashes=False)] == ["manifest.json"]


def test_a_discarded_manifest_is_used_by_nobody(directory: Path):
    commit(directory, STEP, stats={})
    discard_manifest(directory, "why")
    discard_manifest(directory, "again")
    with pytest.raises(ArtifactMissing):
        open_artifact(directory, STEP.fingerprint)
    assert list(list_files(directory)) == ["a.txt", "shard-0/tokens.bin"]


def test_damaged_files_are_removed_so_that_no_step_continues_from_them(directory: Path):
    commit(directory, STEP, stats={})
    (directory / "a.txt").write_bytes(b"alphb")
    discard_damaged(directory, check(directory, hashes=True), "why")
    assert list(list_files(directory)) == ["shard-0/tokens.bin"]
    assert read_manifest(directory) is None


def test_removing_damage_never_follows_a_link(directory: Path, tmp_path: Path):
    commit(directory, STEP, stats={})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokens.bin").write_bytes(b"mine")
    os.replace(directory / "shard-0", directory / ".old")
    (directory / "shard-0").symlink_to(tmp_path / "mine")
    discard_damaged(directory, check(directory, hashes=True), "why")
    assert (tmp_path / "mine" / "tokens.bin").read_bytes() == b"mine"
    assert not (directory / "shard-0").exists()


def test_a_directory_in_a_files_place_and_a_file_in_a_directorys_place_are_moved_away(directory: Path):
    commit(directory, STEP, stats={})
    (directory / "a.txt").unlink()
    (directory / "a.txt").mkdir()
    os.replace(directory / "shard-0", directory / ".old")
    (directory / "shard-0").write_text("x")
    discard_damaged(directory, check(directory, hashes=True), "why")
    assert list(list_files(directory)) == []


def test_empty_directory_forgets_everything_but_never_what_a_link_leads_to(directory: Path, tmp_path: Path):
    commit(directory, STEP, stats={})
    link = tmp_path / "raw" / "linked"
    link.symlink_to(directory)
    empty_directory(link)
    assert not link.is_symlink()
    assert list(link.iterdir()) == []
    assert open_artifact(directory, STEP.fingerprint)
    empty_directory(directory)
    assert list(directory.iterdir()) == []
    assert not list(tmp_path.glob("raw/.discarded-*"))


def test_a_file_too_large_for_the_disk_leaves_no_manifest_and_the_next_commit_succeeds(directory: Path):
    code = (
        "import resource, sys; from pathlib import Path; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64));"
        "from tasks.artifacts import commit; from tests_step import STEP; commit(Path(sys.argv[1]), STEP, stats={})"
    )
    (directory.parent / "tests_step.py").write_text(
        "from model.config_base import Config\nfrom tasks.steps import Step\n"
        "class Reading(Config):\n    source: str = 'plays'\nSTEP = Step('raw', 'plays', Reading())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory.parent), str(Path.cwd())]), "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.run([sys.executable, "-c", code, str(directory)], env=environment, capture_output=True, text=True)
    assert child.returncode != 0
    assert "StorageError" in child.stderr
    assert "bytes are needed" in child.stderr
    assert sorted(path.name for path in directory.iterdir()) == ["a.txt", "shard-0"]
    assert commit(directory, STEP, stats={})


def test_a_kill_at_any_moment_of_a_commit_leaves_all_or_nothing(directory: Path):
    """A child is killed after each of its system calls that change the disk; what it leaves is absent or complete."""
    code = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tasks import artifacts, storage
from model.config_base import Config
from tasks.steps import Step
class Reading(Config):
    source: str = "plays"
left = int(sys.argv[2])
def dying(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("open", "fsync", "replace", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
artifacts.commit(Path(sys.argv[1]), Step("raw", "plays", Reading()), stats={})
"""
    seen = set()
    for moment in range(0, 40, 2):
        child = subprocess.run([sys.executable, "-c", code, str(directory), str(moment), str(Path.cwd())])
        seen.add((child.returncode, read_manifest(directory) is not None))
        if child.returncode == 0:
            break
        assert not os.path.lexists(directory / "manifest.json") or open_artifact(directory, STEP.fingerprint)
        (directory / "manifest.json").unlink(missing_ok=True)
    assert seen >= {(-9, False), (-9, True), (0, True)}
    assert list(list_files(directory)) == ["a.txt", "shard-0/tokens.bin"]
