"""Checkpoints under damage: whatever happens to the newest, the newest good one is used and the bad one is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model import partitioning
from model.checkpoint import Checkpoints, restore_leaves, restore_params, stored_shapes
from model.checkpoint_files import CheckpointError, checkpoint_damage, find_checkpoint


def state(value: float, mesh: Any) -> dict[str, Any]:
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {
        "params": {"w": jax.device_put(jnp.arange(64.0).reshape(16, 4) + value, sharding)},
        "step": jax.device_put(jnp.int32(value), NamedSharding(mesh, PartitionSpec())),
    }


def abstract(mesh: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, mesh))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Steps 10, 20 and 30."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_every=10, max_to_keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, state(step, mesh), {"step": step})
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored_step(directory: Path) -> tuple[int, list[str]]:
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    checkpoints = Checkpoints(directory, keep_every=10, max_to_keep=3)
    restored, progress = checkpoints.restore(abstract(mesh)), checkpoints.progress()
    checkpoints.close()
    np.testing.assert_array_equal(restored["params"]["w"], state(progress["step"], mesh)["params"]["w"])
    assert int(restored["step"]) == progress["step"]
    return progress["step"], checkpoints.skipped


def data_files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_undamaged(saved: Path) -> None:
    assert restored_step(saved) == (30, [])


def test_every_file_that_can_be_damaged_is_noticed_or_does_not_matter(saved: Path) -> None:
    """Each file of the newest checkpoint in turn flipped, emptied and deleted: never a wrong weight, never a crash."""
    pristine = saved.with_name("pristine")
    shutil.copytree(saved, pristine)
    names = [path.relative_to(saved / "30") for path in data_files(saved / "30")]
    assert len(names) >= 8
    for name in names:
        for injure in (flip, lambda path: path.write_bytes(b""), Path.unlink):
            shutil.rmtree(saved)
            shutil.copytree(pristine, saved)
            injure(saved / "30" / name)
            step, skipped = restored_step(saved)
            assert (step == 20 and name.name in skipped[0]) or (step == 30 and not skipped), name


def test_two_damaged_are_both_named(saved: Path) -> None:
    for step in ("30", "20"):
        flip(next(path for path in data_files(saved / step) if path.parent.name == "d"))
    step, skipped = restored_step(saved)
    assert step == 10
    assert [line.split()[1] for line in skipped] == ["30", "20"]


def test_all_damaged_never_starts_over_in_silence(saved: Path) -> None:
    for step in ("10", "20", "30"):
        flip(next(path for path in data_files(saved / step) if path.parent.name == "d"))
    for _ in range(2):  # the second attempt finds them already set aside
        with pytest.raises(CheckpointError, match="does not start over by itself"):
            Checkpoints(saved, keep_every=10, max_to_keep=3)


def test_foreign_directories_do_not_count(saved: Path) -> None:
    (saved / "999").mkdir()
    (saved / "notes").mkdir()
    step, skipped = restored_step(saved)
    assert step == 30
    assert "999" in skipped[0]


def test_restores_onto_another_mesh(saved: Path) -> None:
    mesh = partitioning.make_mesh()
    checkpoints = Checkpoints(saved, keep_every=10, max_to_keep=3)
    restored = checkpoints.restore(abstract(mesh))
    checkpoints.close()
    assert restored["params"]["w"].sharding.spec == PartitionSpec("fsdp")
    np.testing.assert_array_equal(restored["params"]["w"], state(30, mesh)["params"]["w"])


def test_only_the_weights(saved: Path) -> None:
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    params = restore_params(saved / "20", abstract(mesh)["params"])
    np.testing.assert_array_equal(params["w"], state(20, mesh)["params"]["w"])
    flip(next(path for path in data_files(saved / "20") if path.parent.name == "d"))
    assert checkpoint_damage(saved / "20")
    with pytest.raises(CheckpointError, match="cannot be used"):
        restore_params(saved / "20", abstract(mesh)["params"])


def test_multiples_stay_and_of_the_others_the_newest_two_that_are_good(saved: Path) -> None:
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    flip(next(path for path in data_files(saved / "30") if path.parent.name == "d"))
    checkpoints = Checkpoints(saved, keep_every=20)
    for step in (25, 26, 27):
        checkpoints.save(step, state(step, mesh), {"step": step})
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["10", "20", "26", "27"]


def test_single_arrays_by_name(saved: Path) -> None:
    mesh = partitioning.make_mesh()
    assert stored_shapes(saved / "20") == {"params/w": (16, 4), "step": ()}
    found = restore_leaves(saved / "20", {"params/w": abstract(mesh)["params"]["w"]})
    assert list(found) == ["params/w"]
    assert found["params/w"].sharding == abstract(mesh)["params"]["w"].sharding
    np.testing.assert_array_equal(found["params/w"], state(20, mesh)["params"]["w"])


def test_the_checkpoint_that_a_path_names(saved: Path, tmp_path: Path) -> None:
    assert find_checkpoint(saved) == find_checkpoint(saved.parent) == saved / "30"
    assert find_checkpoint(saved / "10") == saved / "10"
    flip(next(path for path in data_files(saved / "30") if path.parent.name == "d"))
    assert find_checkpoint(saved) == saved / "20"
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*30 can be used: .*sha256 differs"):
        find_checkpoint(saved / "30")
    for nothing in (tmp_path / "nowhere", tmp_path / "30"):
        with pytest.raises(CheckpointError, match="is no checkpoint and holds none: give a run's directory"):
            find_checkpoint(nothing)


def test_what_was_saved_to_stay_stays_under_another_cadence(tmp_path: Path) -> None:
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])

    def save(every: int, *steps: int, most: int | None = None) -> list[int]:
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep_every=every, max_to_keep=most)
        for step in steps:
            checkpoints.save(step, state(step, mesh), {"step": step})
        checkpoints.close()
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    assert save(2, 2, 4, 5, 6, 7) == [2, 4, 6, 7]
    assert save(8, 8, 11, 13, 16) == [2, 4, 6, 8, 13, 16]
    assert save(8, 24, most=2) == [16, 24]  # asked for few, it keeps few
