"""Batches for training and evaluation: rows of a mixture's token stores, by step number, on any number of processes.

What a batch holds says `model.assembly`; where its rows come from, `model.order` and `model.packing`.

Shapes: B rows of this process, S seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from model.assembly import Batch, cut_rows, keep_freed_memory, packed_rows
from model.batch_schedule import BatchSchedule, BatchSize
from model.mixture_store import MixtureComponent, MixtureStore
from model.order import ORDER_VERSION, Component, RowOrder, Stage, kept_windows
from model.origin import ANEW, Origin
from model.packing import BestFitPlan, Windows
from model.target_bytes import target_bytes
from model.token_store import StoreError, TokenSplit

__all__ = ["Batch", "BatchLoader", "EvalBatches"]


class BatchLoader:
    """Training batches as a pure function of (mixture, seed, step): no state, no file to save, any step at once."""

    def __init__(
        self,
        mixture: Any,
        *,
        seq_len: int,
        global_batch_size: BatchSize,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """`mixture` is a mixture artifact (anything with `.path`), its directory, or an opened MixtureStore.

        Process p of P takes rows [p * G / P, (p + 1) * G / P) of each global batch of G rows, and reads no others. With stages as
        `global_batch_size` G is that of the step, and rows follow each other across the border of two stages.
        Raises ValueError for sizes that do not fit and StoreError for a mixture that is not whole.
        """
        self.batch_sizes = BatchSchedule.of(global_batch_size, "global_batch_size")
        for stage in self.batch_sizes.stages:
            _check_sizes(seq_len, "global_batch_size", stage.value, process_index, process_count, self.batch_sizes.where(stage))
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed}: the seed of the data order must be 0 or more, and below 2**63")
        self.mixture = mixture if isinstance(mixture, MixtureStore) else MixtureStore.open(mixture)
        self.seq_len = seq_len
        self.seed = seed
        self._process_index, self._process_count = process_index, process_count
        keep_freed_memory()
        trained = self.mixture.trained()
        self._splits = [_train_split(component, seq_len, self.mixture.packing) for component in trained]
        self.layouts = [_layout(split, seq_len, self.mixture.packing) for split in self._splits]
        components = [self._component(of, layout) for of, layout in zip(trained, self.layouts, strict=True)]
        stages = [Stage(self.batch_sizes.rows_before(stage.step), stage.shares) for stage in self.mixture.stages]
        self.order = RowOrder(components, stages, seed)

    @property
    def num_steps(self) -> int | None:
        """Whole batches there are until every component has had its max_epochs; None where that never is."""
        return None if self.order.num_rows is None else self.batch_sizes.steps_within(self.order.num_rows)

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of `step` (from 0). Raises ValueError for a negative step, or one past the end."""
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        self._check_steps(step + 1)
        rows = self.batch_sizes.size_at(step) // self._process_count
        first = self.batch_sizes.rows_before(step) + self._process_index * rows
        return self.rows(first, first + rows)

    def rows(self, first: int, stop: int) -> Batch:
        """Rows [first, stop) of the run, wherever its batches begin. Raises ValueError past the end of the mixture."""
        self.check_rows(stop)
        component_B, window_B, cut_B = self.order.rows(first, stop)
        if self.mixture.packing == "concat":
            start_B = np.empty(stop - first, np.int64)
            for index, layout in enumerate(self.layouts):
                mine = np.flatnonzero(component_B == index)
                assert isinstance(layout, Windows)
                start_B[mine] = layout.starts(window_B[mine], cut_B[mine])
            splits = self._splits
            return cut_rows([(splits[of], start) for of, start in zip(component_B.tolist(), start_B.tolist(), strict=True)], self.seq_len)
        packed = [
            (self._splits[of], layout.row(window))
            for of, window in zip(component_B.tolist(), window_B.tolist(), strict=True)
            if isinstance(layout := self.layouts[of], BestFitPlan)
        ]
        return packed_rows(packed, self.seq_len)

    def check_rows(self, stop: int) -> None:
        """Raises ValueError where the mixture ends before row `stop`."""
        if self.order.num_rows is not None and stop > self.order.num_rows:
            raise ValueError(
                f"rows up to {stop} were asked for, but the mixture {self.mixture.name!r} ends after {self.order.num_rows}, when each "
                f"component has had its max_epochs. Lower train.num_train_steps, raise mixture.max_epochs, or leave it out for one"
            )

    def planned(self, num_steps: int, origin: Origin = ANEW) -> dict[str, dict[str, float]]:
        """What `num_steps` steps read of each component: rows, tokens, and epochs (rows over the component's own rows).

        With an `origin` the steps before it were another run's, and only those that follow are counted.

        With packing best_fit the tokens are without padding, by the mean of the component's rows.
        Raises ValueError where the mixture ends before that many steps.
        """
        if num_steps < 0:
            raise ValueError(f"num_steps={num_steps}: steps count from 0")
        stop = origin.row + origin.rows_until(self.batch_sizes, num_steps)
        if origin.step:
            self.check_rows(stop)
        else:
            self._check_steps(num_steps)
        before, until = self.order.planned_rows(origin.row), self.order.planned_rows(stop)
        rows = {name: until[name] - before[name] for name in until}
        return {
            component.name: {
                "rows": rows[component.name],
                "tokens": rows[component.name] * _tokens_of_a_row(layout),
                "epochs": rows[component.name] / component.epoch_rows,
            }
            for component, layout in zip(self.order.components, self.layouts, strict=True)
        }

    def state(self, next_step: int) -> dict[str, Any]:
        """All that a checkpoint has to hold of the data: where it stands, and what the order is a function of."""
        return {
            "order_version": ORDER_VERSION,
            "mixture": self.mixture.fingerprint,
            "tokenizer": self.mixture.tokenizer.digest,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "global_batch_size": self.batch_sizes.as_json,
            "next_step": next_step,
        }

    def check_state(self, state: Mapping[str, Any], next_step: int) -> None:
        """Raises ValueError where the data state of a checkpoint belongs to other data, another order of it, or another step."""
        for name, value in self.state(next_step).items():
            if state.get(name) != value:
                raise ValueError(
                    f"the checkpoint of step {next_step} was trained on data with {name}={state.get(name)!r}, here it is {value!r}: the "
                    "rows that follow would not be those that come next. Go back to what it was, or move the checkpoint away to train anew"
                )

    def _component(self, of: MixtureComponent, layout: Windows | BestFitPlan) -> Component:
        simulated, kept = self.mixture.simulated_epoching, None
        if simulated is not None:
            kept = kept_windows(layout.num_rows, simulated.experiment_tokens, simulated.target_tokens)
        return Component(of.name, layout.num_rows, of.max_epochs, kept)

    def _check_steps(self, num_steps: int) -> None:
        if self.num_steps is not None and num_steps > self.num_steps:
            raise ValueError(
                f"{num_steps} steps of {self.batch_sizes} rows were asked for, but the mixture {self.mixture.name!r} ends after "
                f"{self.num_steps}: every component has then had its max_epochs, {self.order.num_rows} rows in all. "
                f"Set train.num_train_steps to {self.num_steps} or less, raise mixture.max_epochs, or leave it out for one component"
            )


class EvalBatches:
    """The validation split of one component in its own order: each token after a document's first is scored once.

    In a store with a loss mask only the tokens that it marks are. Every batch has batch_size rows over all processes; the last
    one is filled up with rows of weight 0. Bits per byte = mean cross-entropy in nats * scored_tokens / bytes / ln 2. Both of these
    are of all processes' rows, on every process.
    """

    def __init__(
        self,
        mixture: Any,
        component: str,
        *,
        seq_len: int,
        batch_size: int,
        max_rows: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """`max_rows`: the first so many rows only, whatever the size of a batch; None: all.

        Raises ValueError for sizes that do not fit, StoreError for a component without validation tokens.
        """
        _check_sizes(seq_len, "batch_size", batch_size, process_index, process_count)
        opened = mixture if isinstance(mixture, MixtureStore) else MixtureStore.open(mixture)
        split = opened.component(component).split("validation")
        if split is None:
            raise StoreError(f"component {component!r} has no validation tokens; give its dataset a holdout above 0, or a holdout_tail")
        self.name = component
        self.seq_len = seq_len
        self._split, self._tokenizer = split, opened.tokenizer
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._first_row = process_index * self._rows
        # the targets are tokens 1, 2, ... of the stream, so the last window is the one that holds token num_tokens - 1
        num_windows = max((split.num_tokens + seq_len - 2) // seq_len, 1)
        self._num_rows = num_windows if max_rows is None else min(num_windows, max_rows)
        self._num_batches = (self._num_rows + batch_size - 1) // batch_size
        # of the stream: all tokens that are read, the last of them as a target only
        self._num_tokens = min(self._num_rows * seq_len + 1, split.num_tokens)

    @cached_property
    def scored_tokens(self) -> int:
        """The targets that count; the store is read for that."""
        mask = self._split.loss_mask(0, self._num_tokens).copy()
        mask[self._split.document_starts(0, self._num_tokens)] = 0
        return int(mask.sum(dtype=np.int64))

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text that is scored: of its source where all of that is, else of the targets, by the tokenizer.

        Not all of it are the first batches, answers alone, and a split without BOS, where a document's first token is never a target.
        Raises ValueError where the tokenizer is needed and cannot be opened.
        """
        split, bos_id = self._split, self._tokenizer.bos_id
        if self._num_tokens == split.num_tokens and not split.has_loss_mask and bos_id is not None:
            return split.source_bytes
        return target_bytes(split, self._num_tokens, bos_id, *self._tokenizer.byte_lengths)

    def __len__(self) -> int:
        """The number of batches."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """All batches, in order."""
        return (self.batch(index) for index in range(len(self)))

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`. Raises IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"evaluation batch {index} of component {self.name!r}, which has {len(self)}")
        first = index * self._batch_size + self._first_row
        beyond = self._split.num_tokens  # where a row begins that has nothing
        rows = [(self._split, row * self.seq_len if row < self._num_rows else beyond) for row in range(first, first + self._rows)]
        return cut_rows(rows, self.seq_len)


def _check_sizes(seq_len: int, field: str, batch_size: int, process_index: int, process_count: int, where: str = "") -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}: a row has at least one token")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} of process_count={process_count}: the index must be in [0, count)")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"{field}={batch_size}{where} does not divide over {process_count} processes; use a multiple of {process_count}, "
            f"for example {max(-(-batch_size // process_count), 1) * process_count}"
        )


def _train_split(component: MixtureComponent, seq_len: int, packing: str) -> TokenSplit:
    split = component.split("train")
    num_tokens = 0 if split is None else split.num_tokens
    if split is None or (packing == "concat" and num_tokens < seq_len + 1):
        raise ValueError(
            f"component {component.name!r} has {num_tokens} training tokens, fewer than one window of seq_len + 1 = {seq_len + 1}; "
            f"lower seq_len to {max(num_tokens - 1, 0)} or less, add text to it, or drop it from the mixture"
        )
    return split


def _layout(split: TokenSplit, seq_len: int, packing: str) -> Windows | BestFitPlan:
    return Windows(split.num_tokens, seq_len) if packing == "concat" else BestFitPlan(split.document_lengths(), seq_len)


def _tokens_of_a_row(layout: Windows | BestFitPlan) -> float:
    return layout.seq_len if isinstance(layout, Windows) else layout.num_tokens / layout.num_rows
