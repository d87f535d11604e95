"""Checkpoints straight in a bucket: whole or not there, verified by what Google states, and set aside where they are damaged."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.buckets import path_of, remove_tree, stored_files
from model.checkpoint import Checkpoints
from model.checkpoint_files import COMMIT_FILE, HASHES, CheckpointError, checkpoint_damage, find_checkpoint, steps_in
from model.jumps import Jump, read_skipped_data, skip_data
from model.train_config import SimpleTrainConfig
from tasks.initial_weights import pin_initial_weights
from tests.object_store import BUCKET, object_store, use_store

STATE = {"a": jnp.arange(1000.0), "b": jnp.ones((50, 50))}


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture
def run(store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_store(monkeypatch, store)
    return path_of(f"gs://{BUCKET}/{uuid.uuid4().hex}")


def save(directory: Path, *steps: int) -> None:
    checkpoints = Checkpoints(directory, keep_every=4)
    for step in steps:
        checkpoints.save(step, STATE, {"step": step}, {"metrics.jsonl": f"rows until {step}\n"})
    checkpoints.close()


def restored(directory: Path) -> tuple[int | None, Any, dict[str, str], list[str]]:
    """The step, the state, the curves and what was set aside, as a trainer finds them at its start."""
    checkpoints = Checkpoints(directory, keep_every=4)
    try:
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)
        return checkpoints.latest_step(), checkpoints.restore(abstract), checkpoints.curves(), checkpoints.skipped
    finally:
        checkpoints.close()


def test_the_newest_that_is_whole_is_taken_with_its_curves(run: Path):
    directory = run / "checkpoints"
    save(directory, 1, 2, 3, 4, 5, 6)
    assert steps_in(directory) == [6, 5, 4], "of those that are not kept, the newest two"
    assert [checkpoint_damage(directory / str(step)) for step in (6, 5, 4)] == [None] * 3
    step, state, curves, skipped = restored(directory)
    assert (step, curves, skipped) == (6, {"metrics.jsonl": "rows until 6\n"}, [])
    np.testing.assert_array_equal(state["a"], STATE["a"])


def test_one_that_was_not_committed_is_not_seen(run: Path):
    directory = run / "checkpoints"
    save(directory, 4, 5)
    (directory / "5" / COMMIT_FILE).unlink()  # as a kill before the last file leaves it
    assert steps_in(directory) == [4]
    assert restored(directory)[0] == 4
    save(directory, 5)
    assert restored(directory)[0] == 5


@pytest.mark.parametrize("harm", ["overwritten", "missing"])
def test_a_damaged_one_is_set_aside_with_everything_it_has(run: Path, harm: str):
    directory = run / "checkpoints"
    save(directory, 4, 5)
    victim = directory / "5" / "state" / "manifest.ocdbt"
    before = set(stored_files(directory / "5"))
    if harm == "overwritten":
        victim.write_bytes(b"x" * stored_files(directory / "5")["state/manifest.ocdbt"].size)
    else:
        victim.unlink()
    step, _, curves, skipped = restored(directory)
    assert (step, curves) == (4, {"metrics.jsonl": "rows until 4\n"})
    assert "manifest.ocdbt" in skipped[0]
    (aside,) = [path for path in directory.iterdir() if path.name.startswith("damaged-5-")]
    assert set(stored_files(aside)) == before - ({"state/manifest.ocdbt"} if harm == "missing" else set())


def test_it_does_not_start_over_by_itself_where_none_is_whole(run: Path):
    directory = run / "checkpoints"
    save(directory, 4)
    (directory / "4" / HASHES).write_text("{}")
    with pytest.raises(CheckpointError, match="does not start over by itself"):
        Checkpoints(directory, keep_every=4)


def test_a_copy_on_a_disk_is_verified_too(run: Path, tmp_path: Path):
    save(run / "checkpoints", 4)
    for name in stored_files(run):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((run / name).read_bytes())
    found = find_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoints" / "4"
    victim = found / "state" / "manifest.ocdbt"
    victim.write_bytes(b"x" * victim.stat().st_size)
    assert checkpoint_damage(found) == f"{victim} has another content than was written (md5 differs)"


def test_a_run_can_begin_with_one(run: Path):
    save(run / "checkpoints", 4, 8)
    train = SimpleTrainConfig(num_train_steps=9, train_batch_size=8, learning_rate=1e-3, initialize_from_checkpoint_path=str(run))
    pinned, digest = pin_initial_weights(train)
    assert pinned.initialize_from_checkpoint_path == str(run / "checkpoints" / "8")
    assert digest == hashlib.sha256((run / "checkpoints" / "8" / HASHES).read_bytes()).hexdigest()
    elsewhere = train.model_copy(update={"initialize_from_checkpoint_path": f"{run}-elsewhere"})
    with pytest.raises(CheckpointError, match=r"gs://.*-elsewhere is no checkpoint and holds none"):
        pin_initial_weights(elsewhere)


def test_data_that_was_left_out_is_known_to_every_host(run: Path):
    assert read_skipped_data(run) == ()
    skip_data(run, 3, 24, "the loss was not finite")
    skip_data(run, 7, 8, "again")
    assert read_skipped_data(run) == (Jump(3, 24), Jump(7, 8))
    remove_tree(run)
    assert read_skipped_data(run) == ()
    remove_tree(run)
