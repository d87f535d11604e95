"""Prefect's record of a step is made from its manifest: JSON only, checked at every reading, and stored nowhere."""

import asyncio
import json
import pickle
from pathlib import Path

import pytest
from prefect.results import ResultRecord, ResultStore

from tasks.artifacts import Artifact, ArtifactDamaged, ArtifactMissing, commit
from tasks.records import LEASES, RECORDS, StepCachePolicy, cache_key, parse_cache_key
from tests.step_flow import pickle_record, steps


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


@pytest.fixture
def artifact(root: str) -> Artifact:
    """A committed artifact with one file."""
    directory = steps()[0].directory(root)
    directory.mkdir(parents=True)
    (directory / "text.txt").write_text("alpha")
    return commit(directory, steps()[0], stats={})


def test_the_planted_record_does_execute_in_prefect_itself(tmp_path: Path):
    """Otherwise the next test would prove nothing."""
    ResultRecord.deserialize(pickle_record(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def test_a_record_is_json_made_from_the_manifest_and_cannot_be_written_without_one(root: str, artifact: Artifact):
    key = cache_key(steps()[0], root)
    record = json.loads(RECORDS.read_path(key))
    assert record["metadata"]["serializer"]["type"] == "json"
    assert ResultStore(result_storage=RECORDS).read(key).result == artifact
    RECORDS.write_path(key, b"anything")
    assert not Path(artifact.path, "anything").exists()
    Path(artifact.path, "manifest.json").unlink()
    with pytest.raises(ArtifactMissing):
        RECORDS.write_path(key, b"anything")
    with pytest.raises(ArtifactMissing):
        RECORDS.read_path(key)


@pytest.mark.parametrize("key", ["", "x", "/etc/passwd@" + "0" * 64, "artifact:relative@" + "0" * 64, "artifact:/a@short"])
def test_other_keys_are_refused(key: str):
    with pytest.raises(ValueError, match="not the key"):
        parse_cache_key(key)


def test_keys_hold_the_directory_and_fingerprint_and_are_no_paths(root: str):
    step = steps()[0]
    key = cache_key(step, root)
    assert parse_cache_key(key) == (step.directory(root).absolute(), step.fingerprint)
    assert not Path(key).is_absolute()
    Path(root).mkdir()
    Path(root).with_name("link").symlink_to(root)
    assert cache_key(step, f"{root}/../link") == key


def test_the_policy_uses_the_step_and_the_root_alone(root: str):
    step = steps()[0]
    inputs = {"step": step, "root": root, "inputs": ["anything"]}
    assert StepCachePolicy().compute_key(None, inputs, {"run": 1}) == cache_key(step, root)  # pyright: ignore[reportArgumentType]


def test_a_damaged_artifact_does_not_exist_for_prefect(root: str, artifact: Artifact):
    store, key = ResultStore(result_storage=RECORDS), cache_key(steps()[0], root)
    assert store.exists(key)
    Path(artifact.path, "text.txt").write_text("alphb")
    assert not store.exists(key)
    with pytest.raises(ArtifactDamaged, match=r"text\.txt"):
        RECORDS.read_path(key)
    assert Path(artifact.path, "manifest.json").exists(), "whoever only reads must not change anything"


def test_a_planted_record_is_never_read(root: str, artifact: Artifact, tmp_path: Path):
    key, canary = cache_key(steps()[0], root), tmp_path / "canary"
    planted = pickle_record(canary)
    Path(f"{artifact.path}@{artifact.fingerprint}").write_bytes(planted)
    store = ResultStore(result_storage=RECORDS)
    assert store.read(key).result == artifact
    Path(artifact.path, "manifest.json").write_bytes(planted)
    assert not store.exists(key)
    assert not canary.exists()


def test_asynchronous_reading_is_the_same(root: str, artifact: Artifact):
    key = cache_key(steps()[0], root)
    store = ResultStore(result_storage=RECORDS)
    assert asyncio.run(store.aread(key)).result == artifact
    assert asyncio.run(store.aexists(key))
    asyncio.run(RECORDS.awrite_path(key, b""))


def test_leases_of_steps_can_be_pickled():
    copied = pickle.loads(pickle.dumps(LEASES))
    assert type(copied) is type(LEASES)
    assert copied._arguments == LEASES._arguments
