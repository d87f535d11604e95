"""How a stream of documents becomes rows of seq_len tokens: cut end to end, or whole documents packed by best fit.

  Windows      seq_len tokens each, one after the other from an offset that moves every epoch; nothing is padding. An epoch
               leaves out fewer than 2 * seq_len tokens, before the offset and behind the last window; the offset can be any
               at which the windows still fit, so every token but the stream's first is a target in some epochs
  BestFitPlan  rows ("bins") of whole documents, filled by best-fit decreasing; a document longer than a row is cut

Shapes: D documents, P pieces of documents, R rows, N rows asked for.
"""

from __future__ import annotations

import os
from collections import defaultdict

import numpy as np

# Of BestFitPlan, while it is made: measured for documents of one piece each.
_BYTES_OF_A_PIECE = 65
_PIECES_WITHOUT_A_WORD = 1 << 31


class Windows:
    """Windows of seq_len + 1 tokens, the last of which is only a target, over a stream of num_tokens."""

    def __init__(self, num_tokens: int, seq_len: int) -> None:
        """`num_tokens` is at least seq_len + 1."""
        self.seq_len = seq_len
        # one window is held back so that the offset can move by more than a window; a stream of less than two windows has one
        self.num_rows = max(num_tokens // seq_len - 1, 1)
        self._num_offsets = np.uint64(num_tokens - self.num_rows * seq_len)

    def starts(self, window_N: np.ndarray, cut_N: np.ndarray) -> np.ndarray:
        """First token of windows in the stream, int64 [N]; `cut_N` uint64 [N] is the random number of the window's epoch."""
        return window_N * self.seq_len + (cut_N % self._num_offsets).astype(np.int64)


class BestFitPlan:
    """Which pieces of documents lie in which row, so that rows are full and documents whole.

    Best-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973; for documents Ding et al., "Fewer truncations
    improve language modeling", 2024) on the counts of each length, so its work grows with the number of lengths and not of
    documents; the sorts around it take most of the time. It keeps 13 bytes a piece and 8 a row, and needs about 65 bytes a
    piece beside the lengths while it is made: 6.5 GB and half a minute for 1e8 documents, 65 GB for 1e9.
    """

    def __init__(self, lengths_D: np.ndarray, seq_len: int) -> None:
        """`lengths_D` are the tokens of each document, 1 and up. A document of more than seq_len + 1 is cut into pieces.

        The last token of a document has no target in it, so a piece of that token alone would teach nothing: it is left out
        as input, and a document of seq_len + 1 tokens is one row. Raises ValueError for more pieces than memory can hold.
        """
        start_P, length_P, ends_P = _pieces(lengths_D, seq_len)
        descending_P = _stable_order(seq_len - length_P, seq_len)
        row_P, self.num_rows = _best_fit(np.bincount(length_P, minlength=seq_len + 1), seq_len)
        by_row_P = np.argsort(row_P, kind="stable")
        order_P = descending_P[by_row_P]
        self.seq_len = seq_len
        self.num_tokens = int(length_P.sum(dtype=np.int64))
        self._edges_R = np.concatenate([[0], np.cumsum(np.bincount(row_P, minlength=self.num_rows))])
        self._start_P, self._length_P, self._ends_P = start_P[order_P], length_P[order_P], ends_P[order_P]

    @property
    def fill(self) -> float:
        """The share of the places that hold a token."""
        return self.num_tokens / (self.num_rows * self.seq_len)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of row `index`: first token in the stream int64 [k], length int32 [k], whether the document ends bool [k]."""
        pieces = slice(self._edges_R[index], self._edges_R[index + 1])
        return self._start_P[pieces], self._length_P[pieces], self._ends_P[pieces]


def _pieces(lengths_D: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start in the stream int64 [P], length int32 [P], whether it holds the document's last token bool [P]."""
    stop_D = np.cumsum(lengths_D, dtype=np.int64)
    # in 64 bits, since the longest document and a row may together pass 2**31
    count_D = lengths_D.astype(np.int64)
    count_D += seq_len - 2
    count_D //= seq_len
    np.maximum(count_D, 1, out=count_D)
    _check_memory(int(count_D.sum()))
    start_P = np.repeat(stop_D - lengths_D, count_D)
    cut = np.flatnonzero(count_D > 1)
    if len(cut):
        count_K = count_D[cut]
        first_K = (np.cumsum(count_D) - count_D)[cut]
        number = np.arange(count_K.sum()) - np.repeat(np.cumsum(count_K) - count_K, count_K)
        start_P[np.repeat(first_K, count_K) + number] += number * seq_len
    left_P = np.repeat(stop_D, count_D) - start_P
    return start_P, np.minimum(left_P, seq_len).astype(np.int32), left_P <= seq_len


def _check_memory(num_pieces: int) -> None:
    """Raises ValueError where a plan of so many pieces needs more memory than the machine has."""
    needed, present = num_pieces * _BYTES_OF_A_PIECE, _memory_bytes()
    if needed > present:
        raise ValueError(
            f"packing='best_fit' plans {num_pieces} pieces of documents in memory, which takes about {needed / 1e9:.0f} GB, but there are "
            f"{present / 1e9:.0f} GB; use packing='concat', which needs no plan, or a machine with more memory"
        )


def _memory_bytes() -> int:
    """The memory of the machine; what 2**31 pieces need where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _PIECES_WITHOUT_A_WORD * _BYTES_OF_A_PIECE


def _stable_order(keys_P: np.ndarray, largest: int) -> np.ndarray:
    # numpy sorts 16-bit integers by radix
    return np.argsort(keys_P.astype(np.uint16) if largest < 1 << 16 else keys_P, kind="stable")


def _best_fit(count_of_length: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """The row of each piece, longest piece first, int64 [P], and the number of rows."""
    rows: list[np.ndarray] = [np.empty(0, np.int64)]
    num_rows = 0
    open_rows: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    spaces = 0  # bit s is set while a row has room for s tokens more: the tightest fit is found in a few machine words
    for length in np.flatnonzero(count_of_length)[::-1].tolist():
        left = int(count_of_length[length])
        while left:
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                found = open_rows[space].pop()
                if not open_rows[space]:
                    spaces ^= 1 << space
            else:
                space = seq_len
                found = np.arange(num_rows, num_rows + -(-left // (space // length)))
                num_rows += len(found)
            each = space // length
            used = min(len(found), -(-left // each))
            taken = np.repeat(found[:used], each)[:left]
            rows.append(taken)
            last = len(taken) - (used - 1) * each
            for part, room in (
                (found[used:], space),
                (found[: used - 1], space - each * length),
                (found[used - 1 : used], space - last * length),
            ):
                if len(part) and room:
                    open_rows[room].append(part)
                    spaces |= 1 << room
            left -= len(taken)
    return np.concatenate(rows), num_rows
