"""What a run reads of each dataset: tokens, epochs, bytes to fetch; by its own order, over tokens that are there or estimated ones.

What is known exactly and cannot work is refused; what only an estimate says is a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.batches import BatchLoader
from model.order import Component, RowOrder, Stage, kept_windows
from model.origin import ANEW, Origin
from model.packing import BestFitPlan, Windows
from model.token_store import StoreError, TokenStore, with_tail
from tasks.config import RunConfig
from tasks.data_estimates import bytes_per_token, source_bytes, text_bytes
from tasks.data_steps import DataSteps, Mixing, RawFiles, RegisteredTask, Tokenization
from tasks.manifests import check
from tasks.places import Place, working_directory
from tasks.steps import Step
from tasks.vocabularies import Tokenizer

# How many windows a dataset is taken to have of which nothing is known: as many as no run reads.
_UNKNOWN_WINDOWS = 1 << 40
# Packing more documents takes too long for a plan: seconds for each ten million.
_PACKED_DOCUMENTS = 10_000_000


@dataclass(frozen=True)
class PlannedComponent:
    """One dataset of a run. `measured` False: its tokens are not there yet, and numbers come from its bytes."""

    name: str
    tokens: float  # read by the run
    epochs: float | None  # how often it reads all of what it may use of the dataset; None: not known
    available: float | None  # training tokens that the run may use; None: not known
    measured: bool


@dataclass(frozen=True)
class PlannedData:
    """The datasets a run trains on, and what a person should know of the data before it starts, a sentence each."""

    components: tuple[PlannedComponent, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Train:
    """The training split of a dataset: rows of an epoch, tokens of a row, all tokens; `tokens` None where nothing is known."""

    rows: int
    row_tokens: float
    tokens: float | None
    measured: bool


def planned_data(config: RunConfig, steps: DataSteps, root: Place, origin: Origin = ANEW) -> PlannedData:
    """What the run reads of each dataset it trains on, from its `origin` on.

    Raises ValueError, as the training would, where tokens that are there cannot feed it.
    """
    train = config.train
    warnings = _unseen_changes(steps)
    if (mixture := _mixture_here(steps, root)) is not None:
        loader = BatchLoader(mixture, seq_len=config.seq_len, global_batch_size=train.train_batch_size, seed=train.loader_seed)
        planned = loader.planned(train.num_train_steps, origin)
        components = tuple(
            PlannedComponent(name, part["tokens"], part["epochs"], part["tokens"] / (part["epochs"] or 1) or None, measured=True)
            for name, part in planned.items()
        )
        return PlannedData(components, tuple(warnings))
    mixing = steps.mixture.config
    assert isinstance(mixing, Mixing)
    stages = [Stage(train.batch_schedule.rows_before(stage["step"]), stage["shares"]) for stage in mixing.stages]
    trained = {name for stage in stages for name in stage.shares}
    splits: dict[str, _Train] = {}
    for step in (step for step in steps.tokens if step.name in trained):
        counted = is_here(step, root) and _counted(step, root, config.seq_len, mixing)
        splits[step.name] = counted or _estimated(step, config.data.tokenizer, config.seq_len, mixing, warnings)
    order = RowOrder([_component(name, split.rows, mixing) for name, split in splits.items()], stages, train.loader_seed)
    all_measured = all(split.measured for split in splits.values())
    wanted = origin.row + origin.rows_until(train.batch_schedule, train.num_train_steps)
    if order.num_rows is not None and order.num_rows < wanted:
        warnings += _used_up(config, order.num_rows, wanted, origin, exact=all_measured)
    last = wanted if order.num_rows is None else min(wanted, order.num_rows)
    before, until = order.planned_rows(min(origin.row, last)), order.planned_rows(last)
    rows = {name: until[name] - before[name] for name in until}
    exact = all_measured or not mixing.max_epochs
    components = tuple(_planned(component, rows[component.name], splits[component.name], exact) for component in order.components)
    return PlannedData(components, tuple(warnings))


def is_here(step: Step, root: Place) -> bool:
    """Whether the artifact is committed and its files are on this machine: a plan brings nothing here."""
    place = step.directory(root)
    return step.is_committed(root) and (isinstance(place, Path) or not check(working_directory(place), step.fingerprint, hashes=False))


def _mixture_here(steps: DataSteps, root: Place) -> Path | None:
    """The directory of the mixture, once all that it names is on this machine as well."""
    mixture = steps.mixture.directory(root)
    named = () if isinstance(mixture, Path) else (*steps.tokens, steps.tokenizer)
    return working_directory(mixture) if all(is_here(step, root) for step in (steps.mixture, *named)) else None


def _planned(component: Component, rows: int, split: _Train, exact: bool) -> PlannedComponent:
    known = split.tokens is not None
    return PlannedComponent(
        component.name,
        tokens=rows * split.row_tokens,
        epochs=rows / component.epoch_rows if known else None,
        available=min(component.epoch_rows * split.row_tokens, max(split.tokens or 0, 0)) if known else None,
        # the rows of one dataset depend on the others only where one of them runs out
        measured=split.measured and exact,
    )


def _component(name: str, windows: int, mixing: Mixing) -> Component:
    simulated, kept = mixing.simulated_epoching, None
    if simulated is not None:
        kept = kept_windows(windows, simulated.experiment_tokens, simulated.target_tokens)
    return Component(name, windows, mixing.max_epochs.get(name), kept)


def _counted(step: Step, root: Place, seq_len: int, mixing: Mixing) -> _Train | None:
    """The training split of a token store as the loader has it; None where the store is damaged, and will be made again.

    Raises ValueError where it is no row, or its tail leaves nothing.
    """
    try:
        store = TokenStore.open(working_directory(step.directory(root)))
    except StoreError:
        return None
    split = with_tail(store.splits, mixing.holdout_tail.get(step.name, 0), f"dataset {step.name!r}").get("train")
    least = seq_len + 1 if mixing.packing == "concat" else 1
    if split is None or split.num_tokens < least:
        raise ValueError(
            f"dataset {step.name!r} has {split.num_tokens if split else 0} training tokens, fewer than one row of seq_len + 1 = "
            f"{seq_len + 1}; lower seq_len, add text to it, lower its holdout, or drop it from the mixture"
        )
    if mixing.packing == "concat":
        return _Train(Windows(split.num_tokens, seq_len).num_rows, seq_len, split.num_tokens, measured=True)
    if split.num_documents > _PACKED_DOCUMENTS:
        return _Train(max(split.num_tokens // seq_len, 1), seq_len, split.num_tokens, measured=False)
    plan = BestFitPlan(split.document_lengths(), seq_len)
    return _Train(plan.num_rows, plan.num_tokens / plan.num_rows, plan.num_tokens, measured=True)


def _estimated(step: Step, tokenizer: Tokenizer, seq_len: int, mixing: Mixing, warnings: list[str]) -> _Train:
    """The training split by the size of the source files; adds to `warnings` where by that it is too little."""
    raw, own = step.upstream[0].config, step.config
    if not isinstance(raw, RawFiles) or not isinstance(own, Tokenization) or (size := text_bytes(raw, own.reading)) is None:
        return _Train(_UNKNOWN_WINDOWS, seq_len, None, measured=False)
    all_tokens = size / bytes_per_token(tokenizer) * (1 - own.reading.holdout)
    tokens = all_tokens - mixing.holdout_tail.get(step.name, 0)
    about = f"dataset {step.name!r} has about {round(all_tokens):,} training tokens, estimated from the size of its files"
    if tokens <= 0:
        warnings.append(f"{about}: holdout_tail={mixing.holdout_tail[step.name]} would leave none to train on; lower it")
    elif mixing.packing == "concat" and tokens < seq_len + 1:
        warnings.append(
            f"{about}: that is less than one row of seq_len + 1 = {seq_len + 1}, and would be refused; lower seq_len, add text to it, "
            "lower its holdout, or drop it from the mixture"
        )
    count = max(int(tokens), 1)
    rows = Windows(max(count, seq_len + 1), seq_len).num_rows if mixing.packing == "concat" else max(count // seq_len, 1)
    return _Train(rows, seq_len, tokens, measured=False)


def _used_up(config: RunConfig, num_rows: int, wanted: int, origin: Origin, *, exact: bool) -> list[str]:
    """The warning that the data ends before the last step. Raises ValueError where that is certain."""
    train = config.train
    ends = "ends" if exact else "would end"
    about = "" if exact else "about "
    message = (
        f"train.num_train_steps={train.num_train_steps} needs {wanted:,} rows, and with mixture.max_epochs the data {ends} "
        f"after {about}{num_rows:,}: raise max_epochs, add data, or lower num_train_steps to "
        f"{about}{train.batch_schedule.steps_within(num_rows - origin.row + train.batch_schedule.rows_before(origin.step))}"
    )
    if exact:
        raise ValueError(message)
    return [f"{message}. That is estimated from the size of the files; it is counted when the tokens are there, and refused if so"]


def _unseen_changes(steps: DataSteps) -> list[str]:
    """What can change under a SeqIO task without a step being run again."""
    registered = [(step.name, step.config) for step in steps.tokens if isinstance(step.config, RegisteredTask)]
    lines = []
    if unpinned := [name for name, config in registered if config.revision is None]:
        lines.append(
            f"{_named(unpinned)}: when the data that the SeqIO task reads changes, that is not seen, and tokens that are there are "
            "used again; name the state of the data in dataset.revision, and change it with the data"
        )
    if lost := [name for name, config in registered if config.module is not None and config.module_digest is None]:
        lines.append(f"{_named(lost)}: seqio_module is found nowhere on the import path, so changes in it are not seen; correct the name")
    return lines


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"dataset{'s' * (len(names) > 1)} {', '.join(map(repr, names[:3]))}{more}"


def bytes_to_fetch(steps: DataSteps, root: Place) -> int:
    """Bytes of source files that the run has to copy or download, as far as servers tell or the dataset declares."""
    missing = [step.config for step in steps.downloads if not step.is_committed(root)]
    return sum(source_bytes(config) or 0 for config in missing if isinstance(config, RawFiles))


def tokens_to_write(steps: DataSteps, root: Place, tokenizer: Tokenizer) -> int:
    """About how many tokens the run has to write, of the datasets of whose files the size is known."""
    total = 0.0
    for step in steps.tokens:
        raw, own = step.upstream[0].config, step.config
        if isinstance(raw, RawFiles) and isinstance(own, Tokenization) and not step.is_committed(root):
            total += (text_bytes(raw, own.reading) or 0) / bytes_per_token(tokenizer)
    return int(total)
