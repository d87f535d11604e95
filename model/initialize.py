"""The first state of a run that starts from weights made elsewhere: another run's checkpoint, or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model.buckets import absolute, path_of
from model.checkpoint import named_leaves, read_progress, restore_leaves, stored_shapes
from model.checkpoint_files import find_checkpoint
from model.config import LlamaConfig
from model.distributed import is_leader, leaders_word
from model.foreign_ids import INDEXED_BY_ID, foreign_to_checkpoint, foreign_to_hf
from model.hf_weights import FREE_FIELDS, HfWeights
from model.jumps import Jump
from model.parameters import init_params
from model.train_config import SimpleTrainConfig
from model.train_step import TrainState, abstract_state, first_state

# Where there is no average it starts as the weights, and what steps are judged by is learned anew: nothing is lost.
REPLACEABLE = ("ema_params/", "recent/")
SHOWN = 12  # names in a message; the rest is counted

Leaves = Mapping[str, jax.ShapeDtypeStruct]


class Initialized(NamedTuple):
    """A state, where the data goes on, and what a person should know about it."""

    state: TrainState
    jumps: tuple[Jump, ...]
    notes: tuple[str, ...]


class Weights(Protocol):
    """Where leaves of a state can be read from."""

    unused: list[str]  # what is stored there and not asked for
    differences: list[str]  # fields of the model that are others there

    def problems(self, leaves: Leaves) -> dict[str, str]:
        """Why some of the leaves cannot be had, by name."""
        ...

    def read(self, leaves: Leaves) -> dict[str, jax.Array]:
        """The leaves, which have no problem."""
        ...


class CheckpointWeights:
    """The leaves of one checkpoint's state."""

    def __init__(self, directory: Path, asked_for: Leaves, config: LlamaConfig) -> None:
        self._directory = directory
        self._shapes = stored_shapes(directory)
        self.unused = sorted(self._shapes.keys() - asked_for.keys())
        self.differences = _differences(read_progress(directory).get("config", {}).get("model", {}), config)

    def problems(self, leaves: Leaves) -> dict[str, str]:
        """Those that are not stored, or have another shape."""
        found: dict[str, str] = {}
        for leaf, wanted in leaves.items():
            if leaf not in self._shapes:
                found[leaf] = "it is not stored"
            elif self._shapes[leaf] != wanted.shape:
                found[leaf] = f"it has shape {self._shapes[leaf]} there, {wanted.shape} here"
        return found

    def read(self, leaves: Leaves) -> dict[str, jax.Array]:
        """The arrays, placed as asked."""
        return restore_leaves(self._directory, leaves)


def initialize(
    config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh, *, loader_state: Mapping[str, Any], tokenizer: Path
) -> Initialized:
    """The state that `train.initialize_from_checkpoint_path` or `train.initialize_from_hf` gives.

    Args:
        loader_state: what the order of the data is a function of (`BatchLoader.state`): a checkpoint's position is one in that order.
        tokenizer: that of the data.

    Raises:
        ValueError: the source is damaged or of another shape, lacks something, or is as far as the run is to go.
    """
    abstract = abstract_state(config, train, mesh)
    leaves = named_leaves(abstract)
    if train.initialize_from_hf is not None:
        exported = Path(train.initialize_from_hf).expanduser()
        source, foreign = HfWeights(exported, config), foreign_to_hf(exported, tokenizer)
        loaded, notes = _load(source, _weights_of(leaves), train, train.initialize_from_hf, foreign)
        return Initialized(_completed(abstract, loaded, config, train), (), notes)
    assert train.initialize_from_checkpoint_path is not None
    directory = _checkpoint(absolute(path_of(train.initialize_from_checkpoint_path)))
    wanted = _weights_of(leaves) if train.initialize_weights_only else leaves
    theirs = read_progress(directory)["data"]
    foreign = foreign_to_checkpoint(theirs, loader_state)
    loaded, notes = _load(CheckpointWeights(directory, leaves, config), wanted, train, str(directory), foreign)
    state = _completed(abstract, loaded, config, train)
    step = int(state.step)
    if step >= train.num_train_steps:
        raise ValueError(
            f"{directory} is of step {step} and train.num_train_steps={train.num_train_steps}: raise it, or set "
            f"train.initialize_weights_only to begin at step 0 with its weights"
        )
    return Initialized(state, _jumps(step, theirs, train, loader_state), notes)


def _differences(theirs: Mapping[str, Any], config: LlamaConfig) -> list[str]:
    """Fields of the model that differ from those of a checkpoint without changing a shape.

    Raises:
        ValueError: its weights are those of other heads.
    """
    ours = config.identity()
    changed = [name for name in ours if name in theirs and name not in FREE_FIELDS and theirs[name] != ours[name]]
    told = [f"model.{name} was {theirs[name]!r}, is {ours[name]!r}" for name in changed]
    if {"num_heads", "num_kv_heads"} & set(changed):
        raise ValueError(f"the checkpoint has weights of other heads: {'; '.join(told)}. Give this run the model that it was made with")
    return told


def _weights_of(leaves: Leaves) -> Leaves:
    return {name: leaf for name, leaf in leaves.items() if name.startswith("params/")}


def _checkpoint(path: Path) -> Path:
    """Process 0 verifies; the others take the step that it found."""
    found = find_checkpoint(path) if is_leader() else None
    if jax.process_count() == 1 and found is not None:
        return found
    step = leaders_word(int(found.name) if found is not None and found.name.isdigit() else -1)
    if step < 0:
        raise ValueError(f"train.initialize_from_checkpoint_path={str(path)!r}: name the directory of one step by its step, as the run did")
    below = next((place / str(step) for place in (path / "checkpoints", path) if (place / str(step)).is_dir()), path)
    return below


def _load(
    source: Weights, wanted: Leaves, train: SimpleTrainConfig, where: str, foreign: str | None
) -> tuple[dict[str, jax.Array], tuple[str, ...]]:
    problems = source.problems(wanted)
    if foreign is not None:
        problems |= {name: foreign for name in wanted if name.split("/")[-1] in INDEXED_BY_ID}
    real = {name: problem for name, problem in problems.items() if not name.startswith(REPLACEABLE)}
    if real and (not train.allow_partial_checkpoint or len(real) == len(wanted)):
        optimizer = any(not name.startswith("params/") for name in real)
        without = "and optimizer that it was made with, set train.initialize_weights_only to begin without its optimizer, or "
        raise ValueError(
            f"{where} does not have all that this run needs: {_listed([f'{name} ({why})' for name, why in real.items()])}. Give this run "
            f"the model {without if optimizer else 'that it was made with, or set '}train.allow_partial_checkpoint to begin these fresh"
        )
    notes = [f"begins with {where}"]
    if real:
        notes.append(f"begin fresh, because {where} has none that fit: {_listed([f'{name} ({why})' for name, why in real.items()])}")
    if source.unused and not train.initialize_weights_only:
        notes.append(f"of {where} these are not used: {_listed(source.unused)}")
    notes += source.differences
    return source.read({name: leaf for name, leaf in wanted.items() if name not in problems}), tuple(notes)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _completed(abstract: TrainState, loaded: dict[str, jax.Array], config: LlamaConfig, train: SimpleTrainConfig) -> TrainState:
    """The state with fresh values where nothing was loaded; only these are made."""
    leaves = named_leaves(abstract)
    missing = [name for name in leaves if name not in loaded and not name.startswith("ema_params/")]

    def fresh() -> list[jax.Array]:
        state = named_leaves(first_state(train, init_params(config, jax.random.key(train.seed))))
        return [state[name] for name in missing]

    made = jax.jit(fresh, out_shardings=[leaves[name].sharding for name in missing])() if missing else []
    have = {**loaded, **dict(zip(missing, made, strict=True))}
    for name in leaves:
        if name not in have:
            have[name] = jnp.copy(have["params/" + name.removeprefix("ema_params/")])
    return jax.tree.unflatten(jax.tree.structure(abstract), [have[name] for name in leaves])


def _jumps(step: int, theirs: Mapping[str, Any], train: SimpleTrainConfig, ours: Mapping[str, Any]) -> tuple[Jump, ...]:
    if not train.reset_data_loader_on_init:
        for name in ("order_version", "mixture", "seed", "seq_len"):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"train.reset_data_loader_on_init=False goes on where the checkpoint stood in its data, which had {name}="
                    f"{theirs.get(name)!r}, and here it is {ours.get(name)!r}: set it to True to begin with the first rows"
                )
    target = 0 if train.reset_data_loader_on_init else int(theirs["next_row"])
    rows = target - train.batch_schedule.rows_before(step)
    return (Jump(step, rows),) if rows else ()
