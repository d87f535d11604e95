"""What a host of a slice brings from a bucket before it trains, and what others find there after it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.config import LlamaConfig
from model.config_base import Config
from model.job import TrainingJob
from model.train_config import SimpleTrainConfig
from tasks import objects
from tasks.artifacts import ArtifactDamaged, ArtifactMissing, Damage, brought_here, check, commit, open_artifact
from tasks.bucket_runs import bucket_of, bytes_to_fetch, fetch_mixture, fetch_records, on_this_machine, send_records, stored_entries
from tasks.places import ObjectPath, working_directory
from tasks.steps import Step
from tasks.storage import make_directory
from tests.object_store import BUCKET, object_store, use_store


class Anything(Config):
    source: str = "plays"


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture
def root(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectPath:
    use_store(monkeypatch, store)
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "first"))
    return ObjectPath(BUCKET, f"{uuid.uuid4().hex}/team")


def committed(root: ObjectPath, kind: str, name: str, files: dict[str, str]) -> ObjectPath:
    """An artifact of that kind, made on this machine."""
    step = Step(kind, name, Anything())
    place = step.directory(root)
    assert isinstance(place, ObjectPath)
    for path, text in files.items():
        make_directory((working_directory(place) / path).parent)
        (working_directory(place) / path).write_text(text)
    commit(place, step, stats={})
    return place


def mixture(root: ObjectPath) -> ObjectPath:
    tokenizer = committed(root, "tokenizers", "pieces", {"sentencepiece/tokenizer.model": "a vocabulary"})
    stores = [committed(root, "tokens", name, {"train/0/tokens.bin": name}) for name in ("plays", "sonnets")]
    described = {
        "tokenizer": {"path": f"../../tokenizers/{tokenizer.name}/sentencepiece/tokenizer.model"},
        "components": [{"store": f"../../tokens/{store.name}"} for store in stores],
    }
    return committed(root, "mixtures", "shakespeare", {"mixture.json": json.dumps(described)})


def training_job(root: ObjectPath, mixture: ObjectPath) -> TrainingJob:
    """As a machine with another cache wrote it down."""
    return TrainingJob(
        name="run",
        fingerprint="f" * 64,
        directory=Path("/elsewhere/checkpoints/run"),
        bucket=str(root / "checkpoints/run"),
        mixture=Path("/elsewhere/mixtures/shakespeare"),
        mixture_bucket=str(mixture),
        model=LlamaConfig(),
        train=SimpleTrainConfig(num_train_steps=8, train_batch_size=8, learning_rate=1e-3),
    )


def below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.suffix in (".bin", ".model")}


def test_a_host_brings_the_mixture_its_tokens_and_its_tokenizer(root: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = training_job(root, mixture(root))
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "host"))
    found = on_this_machine(job)
    here = tmp_path / "host" / "gs" / BUCKET / root.key
    assert found.directory == here / "checkpoints/run"
    assert found.directory.is_dir()
    assert found.mixture.parent == here / "mixtures"
    assert found.bucket == job.bucket == bucket_of(found.directory)
    assert len(below(here)) == 3
    tokenizer = json.loads((found.mixture / "mixture.json").read_text())["tokenizer"]["path"]
    assert (found.mixture / tokenizer).read_text() == "a vocabulary"


def test_who_exports_brings_the_tokenizer_alone(root: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = mixture(root)
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "host"))
    here = fetch_mixture(place, tokens=False)
    assert [Path(name).name for name in below(tmp_path / "host")] == ["tokenizer.model"]
    assert bytes_to_fetch(place, here) == len("a vocabulary" + "plays" + "sonnets")


def test_a_job_in_a_directory_stays_as_it_is(tmp_path: Path):
    job = training_job(ObjectPath(BUCKET, "x"), ObjectPath(BUCKET, "y")).model_copy(update={"bucket": None, "mixture_bucket": None})
    assert on_this_machine(job) is job
    assert job.checkpoints == job.directory / "checkpoints"
    assert bucket_of(tmp_path) is None


def test_tokens_that_are_gone_or_damaged_are_named(root: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = mixture(root)
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "host"))
    (victim,) = [stored.path for name, stored in objects.below(root).items() if "plays-" in name and name.endswith("tokens.bin")]
    objects.write(victim, b"PLAYS", generation=None)
    with pytest.raises(ArtifactDamaged, match=r"plays-.*tokens\.bin.*Run the same command again"):
        fetch_mixture(place)
    objects.delete(victim.parent.parent.parent / "manifest.json")
    with pytest.raises(ArtifactMissing, match=r"no artifact in gs://.*/tokens/plays-.*is missing.*Run the same command again"):
        fetch_mixture(place)


def test_records_come_back_on_another_machine(root: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = on_this_machine(training_job(root, mixture(root)))
    (job.directory / "metrics.jsonl").write_text('{"step": 1}\n')
    send_records(job, ("metrics.jsonl", "loss.png"))
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "host"))
    there = on_this_machine(job)
    (there.directory / "loss.png").write_text("of an attempt that the bucket does not know")
    fetch_records(there, ("metrics.jsonl", "loss.png"))
    assert (there.directory / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (there.directory / "loss.png").exists()


def test_a_checkpoint_belongs_to_the_artifact_and_stays_in_the_bucket(root: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = on_this_machine(training_job(root, mixture(root)))
    step = Step("checkpoints", "run", Anything())
    place = ObjectPath.parse(str(job.bucket))
    shard = place / "checkpoints/8/state/d/0"
    objects.write(shard, b"weights", generation=0)
    (job.directory / "metrics.jsonl").write_text('{"step": 8}\n')
    commit(place, step, files=["metrics.jsonl"], stored=stored_entries(job, 8), stats={})
    assert check(place, step.fingerprint, hashes=True) == []
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "host"))
    here = Path(brought_here(open_artifact(place, step.fingerprint)).path)
    assert sorted(path.name for path in here.iterdir()) == ["manifest.json", "metrics.jsonl"]
    objects.write(shard, b"WEIGHTS", generation=None)
    damage = Damage("checkpoints/8/state/d/0", "has other contents than when it was committed (its md5 differs)")
    assert check(place, step.fingerprint, hashes=True) == [damage]
    copy = tmp_path / "copy"
    for name, stored in objects.below(place).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        objects.download(stored, copy / name)
    assert check(copy, step.fingerprint, hashes=True) == [damage]
    (copy / damage.file).write_bytes(b"weights")
    assert check(copy, step.fingerprint, hashes=True) == []
