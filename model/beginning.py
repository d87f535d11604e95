"""Where a run begins: at its own newest checkpoint that verifies, at weights made elsewhere, or at fresh ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from model.batches import BatchLoader
from model.checkpoint import Checkpoints, named_leaves, stored_shapes
from model.config import LlamaConfig
from model.initialize import initialize
from model.job import TrainingJob
from model.jumps import SKIPPED_DATA, Jump, read_skipped_data
from model.origin import ANEW, Origin, origin_of
from model.train_step import TrainState, abstract_state, init_state


class Beginning(NamedTuple):
    """What a run starts with."""

    state: TrainState
    jumps: tuple[Jump, ...]  # of the data, up to and after this step
    data: Mapping[str, Any] | None  # where its own checkpoint stood in the data; None where there is none
    notes: tuple[str, ...] = ()  # what a person should know about it
    origin: Origin = ANEW


def begin(job: TrainingJob, config: LlamaConfig, mesh: Mesh, checkpoints: Checkpoints, loader: BatchLoader) -> Beginning:
    """The state and the data's jumps that the run goes on with.

    Raises:
        ValueError: the newest checkpoint is another run's, with the fields that differ; or what the run is to start from does not fit.
    """
    skipped = read_skipped_data(job.shared)
    if checkpoints.latest_step() is None:
        if job.train.initialize_from_checkpoint_path is None and job.train.initialize_from_hf is None:
            return Beginning(init_state(config, job.train, mesh), skipped, None)
        state, jumps, notes = initialize(config, job.train, mesh, loader_state=loader.state(0), tokenizer=loader.mixture.tokenizer.path)
        return Beginning(state, (*jumps, *skipped), None, notes, origin_of(job.train))
    progress = checkpoints.progress()
    if progress["run"] != job.fingerprint:
        raise ValueError(_another_run(checkpoints.directory, progress, job))
    abstract = abstract_state(config, job.train, mesh)
    _check_stored(checkpoints, abstract, job)
    state = TrainState(*checkpoints.restore(abstract))
    origin = Origin(**progress["origin"]) if "origin" in progress else origin_of(job.train)
    return Beginning(state, _jumps(progress, skipped, job.shared), progress["data"], origin=origin)


def _check_stored(checkpoints: Checkpoints, abstract: Any, job: TrainingJob) -> None:
    """Raises ValueError where the newest checkpoint has other arrays than this run, though it is of the same one."""
    directory = checkpoints.directory / str(checkpoints.latest_step())
    wanted, stored = {name: leaf.shape for name, leaf in named_leaves(abstract).items()}, stored_shapes(directory)
    others = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    if others:
        first = others[0]
        raise ValueError(
            f"{directory} has other arrays than this run, {len(others)} of them, such as {first} (there {stored.get(first, 'none')}, here "
            f"{wanted.get(first, 'none')}): another version of the program wrote it. Use that version, train again with --force "
            f"checkpoints/{job.name}, or start a run from its weights (initialize_from_checkpoint_path, initialize_weights_only)"
        )


def _jumps(progress: Mapping[str, Any], skipped: Sequence[Jump], directory: Path) -> tuple[Jump, ...]:
    """Those that the checkpoint was made with, and those since: data is skipped from a checkpoint's step on."""
    made_with = Counter(Jump(*jump) for jump in progress["jumps"])
    since = Counter(skipped) - made_with  # counted: two ranges may begin at one step and be of one length
    for jump in since:
        if jump.step < progress["step"]:
            raise ValueError(
                f"{directory / SKIPPED_DATA} says that {jump.rows} rows were skipped at step {jump.step}, and the checkpoint of step "
                f"{progress['step']} was trained without that: restore the file as it was"
            )
    return tuple(sorted([*made_with.elements(), *since.elements()]))


def _another_run(directory: Path, progress: Mapping[str, Any], job: TrainingJob) -> str:
    was, now = dict(_flat(progress.get("config", {}))), dict(_flat(job.identity_fields()))
    fields = [
        f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)
    ]
    differing = "; ".join(fields) or "the data is another"
    return (
        f"the checkpoint of step {progress['step']} in {directory} belongs to run {progress['run'][:16]}, not to this run "
        f"{job.fingerprint[:16]}: {differing}. What decides the result may not differ (devices, cadence, logging and paths may): go "
        f"back to what it was, or move the checkpoints away"
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
