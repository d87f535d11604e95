"""Artifacts in buckets against a real server: the same manifests as on disk, brought here when read, never used when damaged."""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.config_base import Config
from tasks import object_artifact, objects
from tasks.artifacts import (
    Artifact,
    ArtifactDamaged,
    ArtifactError,
    ArtifactMissing,
    brought_here,
    check,
    check_writable,
    commit,
    discard_damaged,
    empty_directory,
    open_artifact,
    read_manifest,
)
from tasks.audit import adopt, verify_tree
from tasks.places import ObjectPath, Place, working_directory
from tasks.steps import Step
from tasks.storage import StorageError
from tests.object_store import BUCKET, faulty_proxy, object_store, one_in_five, use_store


class Reading(Config):
    source: str = "plays"


STEP = Step("raw", "plays", Reading())
FILES = {"a.txt": b"alpha", "shard-0/tokens.bin": b"\1\2\3\4", "empty": b""}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture(autouse=True)
def emulator(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, server)


@pytest.fixture
def root() -> ObjectPath:
    return ObjectPath(BUCKET, uuid.uuid4().hex)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Calling it is going to another machine, by its name."""

    def go_to(name: str) -> None:
        monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / name))

    go_to("first")
    return go_to


def write_files(place: Place, files: dict[str, bytes] = FILES) -> Path:
    here = working_directory(place)
    for name, content in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    return here


def committed(root: ObjectPath, step: Step = STEP, files: dict[str, bytes] = FILES) -> Artifact:
    write_files(step.directory(root), files)
    return commit(step.directory(root), step, stats={"tokens": 4})


@pytest.mark.usefixtures("machine")
def test_the_same_manifest_as_on_disk(root: ObjectPath, tmp_path: Path):
    artifact = committed(root)
    write_files(STEP.directory(tmp_path))
    local = commit(STEP.directory(tmp_path), STEP, stats={"tokens": 4})
    assert artifact.path == f"{root}/raw/plays-{STEP.fingerprint[:16]}"
    assert read_manifest(artifact.path) == read_manifest(local.path)
    assert objects.read(ObjectPath.parse(f"{artifact.path}/manifest.json"))[0] == Path(local.path, "manifest.json").read_bytes()
    assert sorted(objects.below(ObjectPath.parse(artifact.path))) == sorted([*FILES, "manifest.json"])
    assert open_artifact(artifact.path, STEP.fingerprint) == artifact
    assert STEP.is_committed(root, hashes=True)
    assert STEP.explain_miss(root) == ""


def test_another_machine_brings_the_files_once(root: ObjectPath, machine, monkeypatch: pytest.MonkeyPatch):
    artifact = committed(root)
    machine("second")
    here = Path(brought_here(artifact).path)
    assert {name: (here / name).read_bytes() for name in FILES} == FILES
    assert not check(here, STEP.fingerprint, hashes=True)
    monkeypatch.setattr(objects, "download", lambda *_: pytest.fail("came again"))
    assert brought_here(artifact).path == str(here)


def test_of_a_copy_only_what_is_missing_or_other_comes_again(root: ObjectPath, machine, monkeypatch: pytest.MonkeyPatch):
    artifact = committed(root)
    machine("second")
    here = Path(brought_here(artifact).path)
    (here / "manifest.json").unlink()
    (here / "a.txt").write_bytes(b"ALPHA")
    (here / "empty").unlink()
    came: list[str] = []
    download = objects.download
    monkeypatch.setattr(objects, "download", lambda stored, target: came.append(target.name) or download(stored, target))
    brought_here(artifact)
    assert sorted(came) == ["a.txt", "empty"]
    assert not check(here, STEP.fingerprint, hashes=True)


@pytest.mark.usefixtures("machine")
def test_threads_that_need_one_artifact_bring_it_once(root: ObjectPath, machine, monkeypatch: pytest.MonkeyPatch):
    artifact = committed(root)
    machine("second")
    came: list[str] = []
    download = objects.download
    monkeypatch.setattr(objects, "download", lambda stored, target: came.append(target.name) or download(stored, target))
    threads = [threading.Thread(target=brought_here, args=(artifact,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == len(FILES)


def missing(place: ObjectPath) -> None:
    objects.delete(place / "a.txt")


def shorter(place: ObjectPath) -> None:
    objects.write(place / "a.txt", b"alph", generation=None)


def other(place: ObjectPath) -> None:
    objects.write(place / "a.txt", b"ALPHA", generation=None)


def torn_manifest(place: ObjectPath) -> None:
    objects.write(place / "manifest.json", b'{"schema": 1', generation=None)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (missing, "a.txt is missing"),
        (shorter, "a.txt has 4 bytes instead of 5"),
        (other, "a.txt has other contents than when it was committed (its sha256 differs)"),
        (torn_manifest, "manifest.json is not JSON (torn or overwritten)"),
    ],
)
def test_damage_is_named_and_a_rebuild_sends_only_what_is_wrong(root: ObjectPath, machine, harm, problem: str, monkeypatch):
    artifact = committed(root)
    place = ObjectPath.parse(artifact.path)
    harm(place)
    assert [str(damage) for damage in check(place, STEP.fingerprint, hashes=True)] == [problem]
    with pytest.raises(ArtifactError, match="Run the"):
        open_artifact(place, STEP.fingerprint)
    report = verify_tree(str(root))
    assert not report.ok
    assert problem in str(report)
    discard_damaged(place, check(place, STEP.fingerprint, hashes=True), "its files are damaged")
    with pytest.raises(ArtifactMissing):
        open_artifact(place, STEP.fingerprint)
    assert STEP.explain_miss(root) == "its files are damaged"
    sent: list[str] = []
    upload = objects.upload
    monkeypatch.setattr(objects, "upload", lambda file, *rest, **options: sent.append(file.name) or upload(file, *rest, **options))
    assert committed(root) == artifact
    assert sent == ([] if harm is torn_manifest else ["a.txt"])
    assert not check(place, STEP.fingerprint, hashes=True)
    assert "discarded" not in " ".join(objects.below(place))


def test_an_object_that_lies_about_its_content_is_found_when_it_is_read(root: ObjectPath, machine):
    artifact = committed(root)
    place = ObjectPath.parse(artifact.path)
    stated = objects.stat(place / "a.txt").sha256
    objects.write(place / "a.txt", b"ALPHA", generation=None, sha256=stated)
    machine("second")
    assert open_artifact(place, STEP.fingerprint) == artifact
    assert "DAMAGED" in str(verify_tree(place))
    with pytest.raises(ArtifactDamaged, match=r"a\.txt has other contents .*it rebuilds this step"):
        brought_here(artifact)
    assert not STEP.is_committed(root)
    assert STEP.explain_miss(root).startswith("its files are damaged: a.txt has other contents")


@pytest.mark.usefixtures("machine")
def test_objects_that_came_by_other_means_are_read_once(root: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    place = ObjectPath.parse(committed(root).path)
    objects.write(place / "a.txt", b"alpha", generation=None)
    reads: list[ObjectPath] = []
    digest = objects.digest
    monkeypatch.setattr(objects, "digest", lambda stored, algorithm: reads.append(stored.path) or digest(stored, algorithm))
    for _ in range(2):
        assert not check(place, STEP.fingerprint, hashes=True)
    assert reads == [place / "a.txt"]


@pytest.mark.usefixtures("machine")
def test_an_interrupted_upload_goes_on_and_nothing_is_there_before_its_end(root: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    place = STEP.directory(root)
    upload = objects.upload

    def breaks(file: Path, *rest, **options):
        if file.name == "tokens.bin":
            raise KeyboardInterrupt
        return upload(file, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(objects, "upload", breaks)
        with pytest.raises(KeyboardInterrupt):
            committed(root)
    assert not STEP.is_committed(root)
    assert STEP.explain_miss(root) == "an earlier run of this step did not finish: it continues"
    sent: list[str] = []
    monkeypatch.setattr(objects, "upload", lambda file, *rest, **options: sent.append(file.name) or upload(file, *rest, **options))
    committed(root)
    assert sent == ["tokens.bin"]
    assert not check(place, STEP.fingerprint, hashes=True)


@pytest.mark.usefixtures("machine")
def test_an_owner_that_lost_the_step_commits_nothing(root: ObjectPath):
    def lost() -> None:
        raise RuntimeError("lost")

    write_files(STEP.directory(root))
    with pytest.raises(RuntimeError, match="lost"):
        commit(STEP.directory(root), STEP, stats={}, still_owner=lost)
    assert not STEP.is_committed(root)


def test_who_was_suspended_changes_nothing_that_its_successor_committed(root: ObjectPath, machine, monkeypatch: pytest.MonkeyPatch):
    """The old owner has looked at what is there and is about to send its files when the new one commits."""
    write_files(STEP.directory(root), {**FILES, "a.txt": b"other"})
    upload = objects.upload

    def meanwhile(file: Path, *rest, **options):
        monkeypatch.setattr(objects, "upload", upload)
        machine("second")
        committed(root)
        machine("first")
        return upload(file, *rest, **options)

    monkeypatch.setattr(objects, "upload", meanwhile)
    monkeypatch.setattr(object_artifact, "_in_parallel", lambda jobs: [job() for job in jobs])

    def still_owner() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        commit(STEP.directory(root), STEP, stats={}, still_owner=still_owner)
    assert not check(STEP.directory(root), STEP.fingerprint, hashes=True)
    assert objects.read(STEP.directory(root) / "a.txt")[0] == b"alpha"


@pytest.mark.usefixtures("machine")
def test_a_second_manifest_is_never_written_over_the_first(root: ObjectPath):
    committed(root)
    with pytest.raises(StorageError, match="was committed by another process meanwhile; run the same command again: it is reused"):
        commit(STEP.directory(root), STEP, stats={"tokens": 5})
    assert read_manifest(STEP.directory(root)).stats == {"tokens": 4}


@pytest.mark.usefixtures("machine")
def test_emptied_here_and_there(root: ObjectPath):
    place = STEP.directory(root)
    committed(root)
    empty_directory(place)
    assert objects.below(place) == {}
    assert list(working_directory(place).iterdir()) == []
    assert STEP.explain_miss(root) == "first run of this step"


@pytest.mark.usefixtures("machine")
def test_a_miss_names_the_field_that_changed(root: ObjectPath):
    committed(root)
    assert Step("raw", "plays", Reading(source="novels")).explain_miss(root) == 'source: "plays" -> "novels"'


@pytest.mark.usefixtures("machine")
def test_verify_hashes_all_below_a_root(root: ObjectPath, tmp_path: Path):
    committed(root)
    committed(root, Step("raw", "novels", Reading(source="novels")))
    write = root / "raw/unfinished-0123456789abcdef/x"
    objects.write(write, b"x", generation=0)
    report = verify_tree(root)
    assert report.ok
    assert [artifact.size for artifact in report.artifacts] == [9, 9]
    assert report.unfinished == (write.parent,)
    with pytest.raises(ArtifactError, match="there is no directory gs://"):
        verify_tree(root / "nothing")
    with pytest.raises(ArtifactError, match="in a bucket there are no links"):
        adopt(tmp_path, root, "raw", "x", {})


@pytest.mark.usefixtures("machine")
def test_too_little_space_for_the_files_is_said_before_they_come(root: ObjectPath, machine, monkeypatch: pytest.MonkeyPatch):
    artifact = committed(root)
    machine("second")
    monkeypatch.setattr(object_artifact, "free_bytes", lambda path: 8)
    with pytest.raises(StorageError, match=r"need 9 more bytes below .*/second, and 8 are free: .*PREFECT_LLAMA_CACHE"):
        brought_here(artifact)
    assert STEP.is_committed(root)


@pytest.mark.usefixtures("machine")
def test_a_place_that_cannot_be_written_is_refused(server: str, root: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    check_writable(root)
    assert objects.below(root) == {}
    with pytest.raises(StorageError, match="there is no bucket gs://no-such-bucket"):
        check_writable(ObjectPath("no-such-bucket", "x"))
    with faulty_proxy(server, lambda method, path: 403 if method == "POST" else None) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        with pytest.raises(StorageError, match=r"grant roles/storage\.objectUser"):
            check_writable(root)


def test_with_one_fault_in_five_the_same_bytes(server: str, root: ObjectPath, machine, monkeypatch: pytest.MonkeyPatch):
    files = {f"shard-{number}/tokens.bin": os.urandom(1000) for number in range(30)}
    with faulty_proxy(server, one_in_five(seed=3)) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        artifact = committed(root, files=files)
        machine("second")
        here = Path(brought_here(artifact).path)
    assert {name: (here / name).read_bytes() for name in files} == files
    assert proxy.seen["lost"] >= 3, proxy.seen
    shutil.rmtree(here)
