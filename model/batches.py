"""Batches for training and evaluation: windows of a mixture's token stores, by step number, on any number of processes.

A batch is a dict of numpy arrays [rows, seq_len]:
  tokens         int32     what the model reads
  targets        int32     the next token of each
  loss_weights   float32   1 where the target counts; 0 where it opens another document, or is padding
  segment_ids    int32     documents of the row numbered from 1; attention must not cross them; 0 is padding
  positions      int32     place in the document, from 0 where it (or the row) begins

Shapes: B rows of this process, S seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from model.mixture_store import MixtureStore
from model.order import Component, RowOrder
from model.token_store import StoreError, TokenSplit

Batch = dict[str, np.ndarray]


class BatchLoader:
    """Training batches as a pure function of (mixture, seed, step): no state, no file to save, any step at once."""

    def __init__(
        self,
        mixture: Any,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """`mixture` is a mixture artifact (anything with `.path`), its directory, or an opened MixtureStore.

        Process p of P takes rows [p * G / P, (p + 1) * G / P) of each global batch of G rows.
        Raises ValueError for sizes that do not fit and StoreError for a mixture that is not whole.
        """
        _check_sizes(seq_len, "global_batch_size", global_batch_size, process_index, process_count)
        if seed < 0:
            raise ValueError(f"seed={seed}: the seed of the data order must be 0 or more")
        self.mixture = mixture if isinstance(mixture, MixtureStore) else MixtureStore.open(mixture)
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self._rows = global_batch_size // process_count
        self._first_row = process_index * self._rows
        trained = [component for component in self.mixture.components if component.weight > 0]
        self._splits: list[TokenSplit | None] = [component.split("train") for component in trained]
        sizes = [split.num_tokens if split else 0 for split in self._splits]
        self.order = RowOrder([Component(c.name, c.weight, n) for c, n in zip(trained, sizes, strict=True)], seq_len, seed)

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of `step` (from 0). Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        first = step * self.global_batch_size + self._first_row
        component_B, start_B = self.order.locate(np.arange(first, first + self._rows))
        windows = [(self._split(index), start) for index, start in zip(component_B.tolist(), start_B.tolist(), strict=True)]
        return _assemble(windows, self.seq_len)

    def planned(self, num_steps: int) -> dict[str, dict[str, float]]:
        """What `num_steps` steps read of each component: tokens, and epochs (tokens over the component's own tokens)."""
        if num_steps < 0:
            raise ValueError(f"num_steps={num_steps}: steps count from 0")
        rows = self.order.planned_rows(num_steps * self.global_batch_size)
        size = self.order.epoch_tokens()
        return {name: {"tokens": count * self.seq_len, "epochs": count * self.seq_len / size[name]} for name, count in rows.items()}

    def _split(self, index: int) -> TokenSplit:
        split = self._splits[index]
        assert split is not None, "the order refuses components without tokens"
        return split


class EvalBatches:
    """The validation split of one component in its own order: each token after a document's first is scored once.

    Every batch has batch_size rows over all processes; the last one is filled up with rows of weight 0.
    `bytes` is the UTF-8 size of the documents and `scored_tokens` the number of targets that count, so that
    bits per byte = mean cross-entropy in nats * scored_tokens / bytes / ln 2.
    """

    def __init__(
        self, mixture: Any, component: str, *, seq_len: int, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        """Raises ValueError for sizes that do not fit, StoreError for a component without validation tokens."""
        _check_sizes(seq_len, "batch_size", batch_size, process_index, process_count)
        opened = mixture if isinstance(mixture, MixtureStore) else MixtureStore.open(mixture)
        split = opened.component(component).split("validation")
        if split is None:
            raise StoreError(f"component {component!r} has no validation tokens; give its dataset a holdout above 0")
        self.name = component
        self.bytes = split.source_bytes
        self.scored_tokens = split.num_tokens - split.num_documents
        self.seq_len = seq_len
        self._split = split
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._first_row = process_index * self._rows
        # the targets are tokens 1, 2, ... of the stream, so the last window is the one that holds token num_tokens - 1
        self._num_windows = max((split.num_tokens + seq_len - 2) // seq_len, 1)

    def __len__(self) -> int:
        """The number of batches."""
        return (self._num_windows + self._batch_size - 1) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        """All batches, in order."""
        return (self.batch(index) for index in range(len(self)))

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`. Raises IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"evaluation batch {index} of component {self.name!r}, which has {len(self)}")
        first = index * self._batch_size + self._first_row
        windows = [(self._split, min(row * self.seq_len, self._split.num_tokens)) for row in range(first, first + self._rows)]
        return _assemble(windows, self.seq_len)


def _check_sizes(seq_len: int, field: str, batch_size: int, process_index: int, process_count: int) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}: a row has at least one token")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} of process_count={process_count}: the index must be in [0, count)")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"{field}={batch_size} does not divide over {process_count} processes; use a multiple of {process_count}, "
            f"for example {max(-(-batch_size // process_count), 1) * process_count}"
        )


def _assemble(windows: Sequence[tuple[TokenSplit, int]], seq_len: int) -> Batch:
    """The arrays of windows of seq_len + 1 tokens; a window that runs past its stream's end is padded with weight 0."""
    width = seq_len + 1
    tokens_BS1 = np.zeros((len(windows), width), np.int32)
    lengths: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    firsts: list[np.ndarray] = []
    for row, (split, start) in enumerate(windows):
        stop = min(start + width, split.num_tokens)
        tokens_BS1[row, : stop - start] = split.tokens(start, stop)
        starts = split.document_starts(start + 1, stop)
        padded = stop - start < width
        edges = np.empty(len(starts) + 2 + padded, np.int64)
        edges[0], edges[1 : len(starts) + 1], edges[len(starts) + 1 :] = 0, starts - start, stop - start
        edges[-1] = width
        number = np.arange(1, len(edges), dtype=np.int32)
        if padded:
            number[-1] = 0
        lengths.append(np.diff(edges))
        firsts.append(edges[:-1])
        numbers.append(number)
    length = np.concatenate(lengths)
    segment_BS1 = np.repeat(np.concatenate(numbers), length).reshape(-1, width)
    first_BS1 = np.repeat(np.concatenate(firsts).astype(np.int32), length).reshape(-1, width)
    segment_BS, position_BS1 = segment_BS1[:, :-1], np.arange(width, dtype=np.int32) - first_BS1
    counts_BS = (segment_BS == segment_BS1[:, 1:]) & (segment_BS > 0)
    return {
        "tokens": tokens_BS1[:, :-1],
        "targets": tokens_BS1[:, 1:],
        "loss_weights": counts_BS.astype(np.float32),
        "segment_ids": segment_BS,
        "positions": position_BS1[:, :-1],
    }
