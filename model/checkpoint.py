"""Checkpoints that vouch for themselves: Orbax writes them in the background, a file of hashes goes in before the
rename that makes them visible, and a resume takes the newest one whose every byte is as it was written.

    checkpoints/<step>/state/...      the arrays (OCDBT)
    checkpoints/<step>/progress/...   JSON: the step, the data position, what the data and model were
    checkpoints/<step>/hashes.json    size and sha256 of every file
    checkpoints/<step>/curves/...     in a bucket, JSON: the curves up to the step, for a host that begins with an empty disk

Those of multiples of `keep_every` steps stay, also when a later attempt asks for other multiples; of the others (by the clock, on
request, at a stop) the newest two. One that has to go is deleted only when the next is committed. On several hosts process 0
verifies and hashes; the directory is one that all of them see, on a disk or in a bucket. In a bucket, where nothing can be renamed,
a file that is written last makes a checkpoint visible, and the hashes go in before it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as preservation
from orbax.checkpoint.path import atomicity

from model.buckets import absolute, in_bucket, set_aside
from model.checkpoint_files import CheckpointError, checkpoint_damage, steps_in, write_hashes
from model.distributed import is_leader, wait_for_all
from model.train_config import NEWEST_CHECKPOINTS

# Host memory for what is being written or read at once, beside the copy of this host's part of the state that a save starts with.
# A single array's part on one host has to fit.
CONCURRENT_GB = 32

KEPT = "kept"  # in the record: whether it was saved to stay

_logger = logging.getLogger(__name__)


class HashedTemporaryPath(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary directory, with our hashes written into it before the rename that commits it."""

    async def finalize(self) -> None:
        """Hashes every file, then lets Orbax rename the directory into place."""
        await asyncio.to_thread(write_hashes, Path(str(self.get())))
        await super().finalize()


class HashedBucketPath(atomicity.CommitFileTemporaryPath):
    """The same in a bucket, where Orbax commits with a file of its own."""

    async def finalize(self) -> None:
        """Writes down what the bucket states about every file, then lets Orbax write the file that commits."""
        directory = cast(Path, self.get())
        if directory.name.isdigit():  # what a checkpoint is made of is committed in the same way, and before it
            await asyncio.to_thread(write_hashes, directory)
        await super().finalize()


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(self, directory: Path, *, keep_every: int, max_to_keep: int | None = None) -> None:
        """`max_to_keep`: of the checkpoints at multiples of `keep_every` steps only so many, the newest; None keeps all.

        Raises:
            CheckpointError: there are checkpoints and none of them can be used; on process 0, which the others follow.
        """
        self.directory = directory
        self.skipped: list[str] = []
        if is_leader():
            directory.mkdir(parents=True, exist_ok=True)
            self._set_damaged_aside()
        wait_for_all("checkpoints verified")
        self._keep_every = keep_every
        # Without a limit a checkpoint is kept for ever from the day it was saved, whatever the cadence is by now.
        # Those of today's cadence stay anyway, so that a start reads only the records of the others.
        others = [step for step in steps_in(directory) if step % keep_every] if max_to_keep is None else []
        promised = [step for step in others if _is_promised(directory / str(step))]
        self._manager = ocp.CheckpointManager(
            absolute(directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation.AnyPreservationPolicy(
                    [
                        preservation.LatestN(NEWEST_CHECKPOINTS),
                        preservation.EveryNSteps(keep_every, max_to_keep=max_to_keep),
                        preservation.CustomSteps(promised),
                    ]
                ),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                temporary_path_class=HashedBucketPath if in_bucket(directory) else HashedTemporaryPath,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(save_concurrent_gb=CONCURRENT_GB, restore_concurrent_gb=CONCURRENT_GB),
                "progress": ocp.JsonCheckpointHandler(),
                "curves": ocp.JsonCheckpointHandler(),
            },
        )

    def _set_damaged_aside(self) -> None:
        """Looks for the newest that verifies. Damaged ones are renamed, so that neither we nor Orbax take them for the latest."""
        for step in steps_in(self.directory):
            path = self.directory / str(step)
            damage = checkpoint_damage(path)
            if damage is None:
                return
            aside = f"damaged-{step}-{time.time_ns()}"
            set_aside(path, aside)
            self.skipped.append(f"checkpoint {step} is not used: {damage} (kept as {aside})")
            _logger.warning(self.skipped[-1])
        if self.directory.is_dir() and any(path.name.startswith("damaged-") for path in self.directory.iterdir()):
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be used and training does not start over by itself: "
                + "; ".join(self.skipped or ["every checkpoint was set aside as damaged before"])
                + f". Restore one of them, or delete {self.directory} to train again from step 0"
            )

    def latest_step(self) -> int | None:
        """The newest step that verified at start or was committed since; None before the first."""
        return self._manager.latest_step()

    def progress(self) -> dict[str, Any]:
        """The record beside the arrays of `latest_step`."""
        return self._restored(progress=ocp.args.JsonRestore())["progress"]

    def restore(self, abstract_state: Any) -> Any:
        """The newest verified state, placed as `abstract_state`'s shardings say.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings; any mesh, on any number of hosts, will do.
        """
        return self._restored(state=ocp.args.StandardRestore(abstract_state))["state"]

    def _restored(self, **items: Any) -> Any:
        return self._manager.restore(self.latest_step(), args=ocp.args.Composite(**items))

    def curves(self) -> dict[str, str]:
        """The curves up to `latest_step`, by file name; none where they were not saved with it."""
        step = self.latest_step()
        if step is None or not (self.directory / str(step) / "curves").is_dir():
            return {}
        return self._restored(curves=ocp.args.JsonRestore())["curves"]

    def save(self, step: int, state: Any, progress: dict[str, Any], curves: dict[str, str] | None = None) -> None:
        """Starts saving in the background. Waits only for a save still under way; raises what that one failed with."""
        if step != self.latest_step():
            record = {**progress, KEPT: step % self._keep_every == 0}
            items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(record)}
            if curves is not None:
                items["curves"] = ocp.args.JsonSave(curves)
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Blocks until every save is committed. Raises what a background save failed with."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and lets Orbax go."""
        self._manager.wait_until_finished()
        self._manager.close()


def _is_promised(directory: Path) -> bool:
    try:
        return bool(read_progress(directory).get(KEPT))
    except CheckpointError:  # damaged: it was not the newest, so nobody looked yet
        return True


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a state by names such as `opt_state/1/mu/layers/wq`, the same before saving and as Orbax keeps them."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of one committed checkpoint directory, by name."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return {name: tuple(leaf.shape) for name, leaf in named_leaves(_stored_tree(checkpointer, directory)).items()}


def restore_leaves(directory: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some arrays of one committed checkpoint directory, `checkpoints/<step>`, which is not verified again.

    Args:
        directory: the checkpoint; any mesh, on any number of hosts, may have written it.
        wanted: shape, dtype and sharding by name; all must be there.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _stored_tree(checkpointer, directory)
        chosen = jax.tree_util.tree_map_with_path(lambda path, _: wanted.get(_name(path), ocp.PLACEHOLDER), tree)
        arguments = ocp.args.PyTreeRestore(chosen, restore_args=ocp.checkpoint_utils.construct_restore_args(chosen))
        restored = named_leaves(checkpointer.restore(absolute(directory / "state"), args=arguments))
    return {name: restored[name] for name in wanted}


def _stored_tree(checkpointer: Any, directory: Path) -> Any:
    return checkpointer.metadata(absolute(directory / "state")).item_metadata.tree


def read_progress(directory: Path) -> dict[str, Any]:
    """The record beside the arrays of one committed checkpoint directory, `checkpoints/<step>`.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(absolute(directory / "progress"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} cannot be used, its record is not there or damaged ({error}): take another step") from error


def restore_params(directory: Path, abstract_params: Any, *, field: str = "params") -> Any:
    """Only the weights of one committed checkpoint directory, verified first.

    Args:
        directory: `checkpoints/<step>`.
        abstract_params: pytree of `jax.ShapeDtypeStruct` with shardings.
        field: which part of the saved TrainState, `params` or `ema_params`.

    Raises:
        CheckpointError: naming the damaged file.
    """
    if is_leader() and (damage := checkpoint_damage(directory)):
        raise CheckpointError(f"{directory} cannot be used: {damage}")
    leaves = restore_leaves(directory, named_leaves({field: abstract_params}))
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves.values())
