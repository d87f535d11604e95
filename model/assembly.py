"""Rows of tokens as arrays: from where a row begins in a stream, or from the pieces of documents packed into it.

A batch is a dict of numpy arrays [rows, seq_len]:
  tokens         int32     what the model reads
  targets        int32     the next token of each
  loss_weights   float32   1 where the target counts; 0 where it opens another document, is masked out, or is padding
  segment_ids    int32     documents of the row numbered from 1; attention must not cross them; 0 is padding
  positions      int32     place in the document, from 0 where it (or its piece, or the row) begins

Shapes: B rows, S seq_len, D documents that begin in the batch, F = B * S places, row after row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.token_split import TokenSplit

Batch = dict[str, np.ndarray]
Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]


def keep_freed_memory() -> None:
    """Lets the C library keep the memory of freed batches for the next ones, which makes them in a third of the time.

    glibc returns freed memory to the system beyond twice the largest block that was mapped and freed so far (mallopt(3),
    M_MMAP_THRESHOLD), and every page of it then costs a fault again. Freeing one block just below its limit of 32 MiB, which
    is never written to, raises that bound. Elsewhere this does nothing.
    """
    np.empty(31 << 20, np.uint8)


def cut_rows(rows: Sequence[tuple[TokenSplit, int]], seq_len: int) -> Batch:
    """Windows of seq_len + 1 tokens from the given token of a stream on; one that runs past the end is padded with weight 0."""
    width = seq_len + 1
    tokens_BS1 = np.empty((len(rows), width), np.int32)
    weights_BS = np.ones((len(rows), seq_len), np.float32)
    starts: list[np.ndarray] = []
    shifts: list[int] = []
    padded: list[tuple[int, int]] = []
    for row, (split, start) in enumerate(rows):
        shard = split.part_at(start)
        base = split.token_base[shard]
        if start + width <= split.token_base[shard + 1]:
            # all but a few windows lie in one shard: its arrays at once, without a call for each
            part, first, stop = split.mapped(shard), start - base, start - base + width
            tokens_BS1[row] = part.tokens[first:stop]
            low, high = part.offsets.searchsorted((first + 1, stop))
            starts.append(part.offsets[low:high])
            shifts.append(row * seq_len - first)
            if part.loss_mask is not None:
                weights_BS[row] = part.loss_mask[first + 1 : stop]
            continue
        stop = min(start + width, split.num_tokens)
        tokens_BS1[row, : stop - start] = split.tokens(start, stop)
        tokens_BS1[row, stop - start :] = 0
        starts.append(split.document_starts(start + 1, stop))
        shifts.append(row * seq_len - start)
        if split.has_loss_mask and stop > start:
            weights_BS[row, : stop - start - 1] = split.loss_mask(start + 1, stop)
        if stop - start < width:
            padded.append((row, stop - start))
    # a start at place p of the batch is the target of place p - 1, also where that closes the row before
    starts_D = np.concatenate(starts) + np.repeat(np.array(shifts, np.int64), [len(part) for part in starts])
    weights_BS.reshape(-1)[starts_D - 1] = 0
    segments_BS, positions_BS = _documents(starts_D, padded, weights_BS.shape)
    for row, length in padded:
        weights_BS[row, max(length - 1, 0) :] = 0
    return {
        "tokens": tokens_BS1[:, :-1],
        "targets": tokens_BS1[:, 1:],
        "loss_weights": weights_BS,
        "segment_ids": segments_BS,
        "positions": positions_BS,
    }


def packed_rows(rows: Sequence[tuple[TokenSplit, Pieces]], seq_len: int) -> Batch:
    """Rows of pieces of documents: (first token in the stream, length, whether the document ends with it) of each, in their order.

    A document lies in one shard. Its last token has no target: 0, with weight 0. What is left of a row is padding.
    """
    shape = len(rows), seq_len
    tokens_BS, targets_BS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights_BS = np.zeros(shape, np.float32)
    starts: list[int] = []
    padded: list[tuple[int, int]] = []
    for row, (split, pieces) in enumerate(rows):
        tokens_S, targets_S, weights_S = tokens_BS[row], targets_BS[row], weights_BS[row]
        place = 0
        for start, length, ends in zip(*(column.tolist() for column in pieces), strict=True):
            shard = split.part_at(start)
            part, first = split.mapped(shard), start - split.token_base[shard]
            scored = length - 1 if ends else length
            tokens_S[place : place + length] = part.tokens[first : first + length]
            targets_S[place : place + scored] = part.tokens[first + 1 : first + 1 + scored]
            weights_S[place : place + scored] = 1 if part.loss_mask is None else part.loss_mask[first + 1 : first + 1 + scored]
            starts.append(row * seq_len + place)
            place += length
        if place < seq_len:
            padded.append((row, place))
    segments_BS, positions_BS = _documents(np.array(starts, np.int64), padded, shape)
    return {"tokens": tokens_BS, "targets": targets_BS, "loss_weights": weights_BS, "segment_ids": segments_BS, "positions": positions_BS}


def _documents(starts_D: np.ndarray, padded: Sequence[tuple[int, int]], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """segment_ids and positions int32 [B,S], from where documents begin (int64 [D] in [0, F]) and rows that end early.

    A row begins a segment wherever it was cut. `padded` lists (row, tokens in it).
    """
    num_rows, seq_len = shape
    places = num_rows * seq_len
    begins_F = np.zeros(places + 1, bool)
    begins_F[starts_D] = True
    begins_F[::seq_len] = True
    begins_F[[row * seq_len + length for row, length in padded]] = True
    starts = np.flatnonzero(begins_F)[:-1]
    lengths = np.diff(starts, append=places)
    row_starts = np.flatnonzero(starts % seq_len == 0)
    number = np.arange(1, len(starts) + 1) - np.repeat(row_starts, np.diff(row_starts, append=len(starts)))
    segments_BS = np.repeat(number.astype(np.int32), lengths).reshape(shape)
    positions_F = np.repeat(starts.astype(np.int32), lengths)
    np.subtract(np.arange(places, dtype=np.int32), positions_F, out=positions_F)
    for row, length in padded:
        segments_BS[row, length:] = 0
    return segments_BS, positions_F.reshape(shape)
