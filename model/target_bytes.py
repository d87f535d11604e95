"""UTF-8 bytes of the text that targets stand for, counted token by token: for bits per byte of a part of the text.

Shapes: T tokens of a block of the stream, the one before it included, V vocab_size.
"""

from __future__ import annotations

import numpy as np

from model.token_split import TokenSplit

_BLOCK = 1 << 20


def target_bytes(split: TokenSplit, stop: int, bos_id: int | None, within_V: np.ndarray, opening_V: np.ndarray) -> int:
    """The bytes of the tokens [1, stop) of a stream, as far as they are targets that count; these tokens are read for that.

    A document's first token is no target, and where there is a loss mask only what it marks counts.

    Args:
        split: the stream.
        stop: at most its num_tokens.
        bos_id: what documents begin with, or None.
        within_V: the bytes of each id, int64.
        opening_V: those of an id that follows BOS, int64.
    """
    total = 0
    for start in range(1, stop, _BLOCK):
        before, end = start - 1, min(start + _BLOCK, stop)
        ids_T = split.tokens(before, end)
        bytes_T = within_V[ids_T]
        starts = split.document_starts(before, end) - before
        # documents that a task of SeqIO made itself may begin otherwise
        opening = starts[ids_T[starts] == bos_id] + 1 if bos_id is not None else starts[:0]
        opening = opening[opening < len(ids_T)]
        bytes_T[opening] = opening_V[ids_T[opening]]
        bytes_T[starts] = 0
        bytes_T *= split.loss_mask(before, end)
        total += int(bytes_T[1:].sum())
    return total
