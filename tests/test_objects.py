"""Objects in buckets against a real server: preconditions hold, what can pass is tried again, and the rest says what to do."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import object_requests, objects
from tasks.object_requests import PreconditionFailed
from tasks.places import ObjectPath, place_of, working_directory
from tasks.storage import StorageError
from tests.object_store import BUCKET, faulty_proxy, object_store, one_in_five, use_store


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture(autouse=True)
def emulator(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, server)


@pytest.fixture
def place() -> ObjectPath:
    return ObjectPath(BUCKET, f"{uuid.uuid4().hex}/ä b+c%.bin")


def test_places_are_read_and_written_as_people_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path))
    place = place_of("gs://my-bucket/runs//one/")
    assert str(place) == "gs://my-bucket/runs/one"
    assert place / "raw" == ObjectPath("my-bucket", "runs/one/raw")
    assert (place.name, str(place.parent), str(place.parent.parent)) == ("one", "gs://my-bucket/runs", "gs://my-bucket")
    assert working_directory(place / "raw") == tmp_path / "gs" / "my-bucket" / "runs" / "one" / "raw"
    assert place_of("file:///a/b") == place_of("/a/b") == Path("/a/b")
    for wrong in ("s3://bucket/x", "gs://", "gs://Bucket/x", "gs://bucket/../x"):
        with pytest.raises(ValueError, match=r"gs://bucket/prefix"):
            place_of(wrong)


def test_of_writers_of_one_generation_one_wins(place: ObjectPath):
    first = objects.write(place, b"one", generation=0)
    with pytest.raises(PreconditionFailed):
        objects.write(place, b"two", generation=0)
    second = objects.write(place, b"two", generation=first)
    with pytest.raises(PreconditionFailed):
        objects.write(place, b"three", generation=first)
    assert objects.read(place) == (b"two", second)


def test_the_same_content_is_taken_for_our_own_write(place: ObjectPath):
    """What cannot be told apart from a write of ours whose answer was lost: the object is as wanted."""
    first = objects.write(place, b"one", generation=0)
    assert objects.write(place, b"one", generation=0) == first


def test_many_writers_at_once_and_exactly_one_gets_through(place: ObjectPath):
    won: list[int] = []

    def attempt(number: int) -> None:
        try:
            objects.write(place, b"%d" % number, generation=0)
        except PreconditionFailed:
            return
        won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [objects.read(place)[0]]


def test_files_travel_whole_and_are_listed_with_what_they_hold(place: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "_DOWNLOAD_BYTES", 100_000)
    for name, content in (("big", os.urandom(350_001)), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        stored = objects.upload(tmp_path / name, place.parent / f"d/{name}", sha256=sha256, generation=0)
        assert objects.below(place.parent)[f"d/{name}"] == stored == objects.stat(place.parent / f"d/{name}")
        assert (stored.size, stored.sha256) == (len(content), sha256)
        assert objects.download(stored, tmp_path / "back") == sha256 == objects.digest(stored)
        assert (tmp_path / "back").read_bytes() == content
    assert objects.directories_in(place.parent) == [place.parent / "d"]
    objects.delete(place.parent / "d/big")
    objects.delete(place.parent / "d/big")
    assert list(objects.below(place.parent)) == ["d/empty"]


def test_a_part_of_another_generation_is_never_mixed_in(place: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "_DOWNLOAD_BYTES", 4)
    objects.write(place, b"12345678", generation=0)
    stored = objects.stat(place)
    parts = objects.parts_stored(stored)
    assert next(parts) == b"1234"
    objects.write(place, b"abcdefgh", generation=None)
    with pytest.raises(FileNotFoundError):
        next(parts)


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, "reset", "lost", "silent"])
def test_what_may_pass_is_tried_again_and_a_write_that_was_done_is_known_again(server: str, place: ObjectPath, fault, monkeypatch):
    monkeypatch.setattr(object_requests, "_LEAST_SECONDS", 0.3 if fault == "silent" else 60.0)
    pending = [fault, fault]
    with faulty_proxy(server, lambda method, path: pending.pop() if pending else None) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        generation = objects.write(place, b"x" * 100_000, generation=0)
        pending[:] = [fault]
        assert objects.read(place) == (b"x" * 100_000, generation)
    assert proxy.seen[fault] == 3


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "was refused"), (401, "gcloud auth application-default login"), (403, "grant roles/storage.objectUser on gs://artifacts-of")],
)
def test_what_does_not_pass_is_not_tried_again_and_says_what_to_do(server: str, place: ObjectPath, status, message, monkeypatch):
    with faulty_proxy(server, lambda method, path: status) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        with pytest.raises(StorageError, match=message):
            objects.write(place, b"x", generation=0)
    assert proxy.seen["requests"] == 1


def test_a_service_that_stays_away_is_named_in_the_end(server: str, place: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    with faulty_proxy(server, lambda method, path: 503) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        with pytest.raises(StorageError, match=r"did not answer in 10 tries .503: injected.*again later"):
            objects.read(place)
    assert proxy.seen["requests"] == 10


def test_a_bucket_or_an_object_that_is_not_there(place: ObjectPath):
    with pytest.raises(FileNotFoundError):
        objects.read(place)
    nowhere = ObjectPath("no-such-bucket", "x")
    for use in (lambda: objects.write(nowhere, b"x", generation=0), lambda: objects.below(nowhere)):
        with pytest.raises(StorageError, match=r"there is no bucket gs://no-such-bucket: create it .* or correct --root"):
            use()


def test_no_credentials(place: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(StorageError, match=r"no valid Google credentials for gs://.*gcloud auth application-default login"):
        objects.read(place)


def test_with_one_fault_in_five_all_arrives_as_without(server: str, place: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "_DOWNLOAD_BYTES", 10_000)
    content = os.urandom(50_000)
    (tmp_path / "file").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    with faulty_proxy(server, one_in_five(seed=1)) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        for number in range(10):
            stored = objects.upload(tmp_path / "file", place / str(number), sha256=sha256, generation=0)
            assert objects.download(stored, tmp_path / "back") == sha256
        assert len(objects.below(place)) == 10
    assert all(proxy.seen[kind] for kind in (503, 429, "reset", "lost")), proxy.seen
