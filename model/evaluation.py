"""Held-out loss: sums of nats, tokens and bytes over everything, divided once at the end.

Loss is nats per token, bits per byte is nats / (ln 2 * source bytes), so that runs with different tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from model.batches import EvalBatches
from model.feed import place
from model.losses import LossSums

SumsFunction = Callable[[Any, dict[str, jax.Array]], LossSums]


def evaluate(
    sums_of: SumsFunction, params: Any, components: Iterable[EvalBatches], sharding: Sharding, *, max_batches: int | None = None
) -> dict[str, float]:
    """`eval/loss` and `eval/bpb` over all components together, `eval/<component>/loss` and `/bpb` for each.

    Every held-out token counts once, whatever batch it sits in. The z-loss is a regulariser and no part of these numbers.
    Bits per byte need every token of a component and the size of its text, so a component cut short by `max_batches` has none,
    nor has one whose `bytes` are not known.
    """
    metrics: dict[str, float] = {}
    totals = np.zeros(3)  # nats, tokens, bytes
    all_whole = True
    for component in components:
        nats = tokens = 0.0
        whole = True
        for index, rows in enumerate(component):
            if max_batches is not None and index >= max_batches:
                whole = False
                break
            sums = sums_of(params, place(rows, sharding))
            nats, tokens = nats + float(sums.cross_entropy), tokens + float(sums.weight)
        if tokens == 0:
            continue
        metrics[f"eval/{component.name}/loss"] = nats / tokens
        if whole and component.bytes is not None:
            metrics[f"eval/{component.name}/bpb"] = bits_per_byte(nats, component.bytes)
        all_whole &= whole and component.bytes is not None
        totals += (nats, tokens, component.bytes or 0)
    if totals[1]:
        metrics["eval/loss"] = float(totals[0] / totals[1])
        if all_whole:
            metrics["eval/bpb"] = bits_per_byte(float(totals[0]), float(totals[2]))
    return metrics


def bits_per_byte(nats: float, source_bytes: float) -> float:
    """Cross-entropy of a text in bits for each byte of its UTF-8 form."""
    return nats / (math.log(2) * source_bytes)
