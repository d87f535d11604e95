"""What a run reads of each dataset: tokens, epochs, bytes to fetch; measured where the tokens are there, else estimated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.batches import BatchLoader
from model.order import Component, RowOrder, Stage, kept_windows
from tasks.artifacts import read_manifest
from tasks.config import RunConfig
from tasks.data_steps import DataSteps, Mixing, RawFiles
from tasks.steps import Step

# English text gives 3 to 4.5 bytes a token with the usual vocabularies, code less. Only the order of magnitude is meant.
BYTES_PER_TOKEN = 4.0


# How many windows a dataset is taken to have of which nothing is known: as many as no run reads.
_UNKNOWN_WINDOWS = 1 << 40


@dataclass(frozen=True)
class PlannedComponent:
    """One dataset of a run. `measured` False: its tokens are not there yet, and numbers come from its bytes."""

    name: str
    tokens: float  # read by the run
    epochs: float | None  # how often it reads all of what it may use of the dataset; None: not known
    available: float | None  # training tokens that the run may use; None: not known
    measured: bool


def planned_components(config: RunConfig, steps: DataSteps, root: Path) -> tuple[PlannedComponent, ...]:
    """What the run reads of each dataset it trains on: by the run's own order, over tokens that are there or estimated ones.

    Raises ValueError, as the training would, where the committed mixture cannot feed it, or where by the estimate every
    dataset reaches its max_epochs long before the last step.
    """
    train = config.train
    if steps.mixture.is_committed(root):
        loader = BatchLoader(
            steps.mixture.directory(root), seq_len=config.seq_len, global_batch_size=train.train_batch_size, seed=train.loader_seed
        )
        planned = loader.planned(train.num_train_steps)
        return tuple(
            PlannedComponent(name, part["tokens"], part["epochs"], part["tokens"] / (part["epochs"] or 1) or None, measured=True)
            for name, part in planned.items()
        )
    mixing = steps.mixture.config
    assert isinstance(mixing, Mixing)
    stages = [Stage(stage["step"] * train.train_batch_size, stage["shares"]) for stage in mixing.stages]
    trained = {name for stage in stages for name in stage.shares}
    sources = {step.name: _available(step, root, mixing) for step in steps.tokens if step.name in trained}
    components = [_component(name, sources[name][0], config.seq_len, mixing) for name in sources]
    order = RowOrder(components, stages, train.loader_seed)
    wanted = train.num_train_steps * train.train_batch_size
    _check_rows(order, wanted, train.num_train_steps)
    rows = order.planned_rows(wanted if order.num_rows is None else min(wanted, order.num_rows))
    return tuple(
        PlannedComponent(
            component.name,
            tokens=rows[component.name] * config.seq_len,
            epochs=None if sources[component.name][0] is None else rows[component.name] / component.epoch_rows,
            available=None if sources[component.name][0] is None else component.epoch_rows * config.seq_len,
            measured=sources[component.name][1],
        )
        for component in components
    )


def _component(name: str, available: float | None, seq_len: int, mixing: Mixing) -> Component:
    windows = _UNKNOWN_WINDOWS if available is None else max(int(available) // seq_len, 1)
    simulated = mixing.simulated_epoching
    kept = None
    if simulated is not None:
        kept = kept_windows(windows, simulated.experiment_tokens, simulated.target_tokens)
    return Component(name, windows, mixing.max_epochs.get(name), kept)


def _check_rows(order: RowOrder, wanted: int, steps: int) -> None:
    # an estimate can be wrong by a factor of two; what is off by more is a mistake
    if order.num_rows is not None and 2 * order.num_rows < wanted:
        raise ValueError(
            f"train.num_train_steps={steps} needs {wanted:,} rows, and with mixture.max_epochs every dataset is used up after about "
            f"{order.num_rows:,}: raise max_epochs, add data, or lower num_train_steps to about {steps * order.num_rows // wanted}"
        )


def bytes_to_fetch(steps: DataSteps, root: Path) -> int:
    """Bytes of source files that the run has to copy or download, as far as servers tell or the dataset declares."""
    missing = [step.config for step in steps.downloads if not step.is_committed(root)]
    return sum(_source_bytes(config) or 0 for config in missing if isinstance(config, RawFiles))


def _source_bytes(config: RawFiles) -> int | None:
    sizes = [file.bytes for file in config.files if file.bytes is not None]
    return sum(sizes) if len(sizes) == len(config.files) else config.source_bytes


def _available(step: Step, root: Path, mixing: Mixing) -> tuple[float | None, bool]:
    """Training tokens of a dataset without its tail, None where nothing is known; and whether they were counted."""
    tail = mixing.holdout_tail.get(step.name, 0)
    manifest = read_manifest(step.directory(root))
    if manifest is not None and manifest.fingerprint == step.fingerprint:
        return manifest.stats["splits"].get("train", {}).get("tokens", 0) - tail, True
    raw = step.upstream[0].config
    if isinstance(raw, RawFiles) and (found := _source_bytes(raw)) is not None:
        # compressed files hold several times their size
        compressed = sum(file.name.endswith((".gz", ".zst", ".zstd", ".bz2", ".xz")) for file in raw.files)
        return found * (4 if 2 * compressed > len(raw.files) else 1) / BYTES_PER_TOKEN - tail, False
    return None, False
