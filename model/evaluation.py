"""Held-out loss: sums of nats, tokens and bytes over everything, divided once at the end.

Loss is nats per token, bits per byte is nats / (ln 2 * bytes of text), so that runs with different tokenizers compare. Micro numbers
are such quotients of sums over several components, macro numbers the plain mean of the components' own. The names are Levanter's;
it weighs the micro loss of a parent tag by losses instead of tokens, and takes the mean of each batch's bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding

from model.batches import EvalBatches
from model.feed import place
from model.losses import LossSums

SumsFunction = Callable[[Any, dict[str, jax.Array]], LossSums]


class HeldOut(NamedTuple):
    """What was scored: sums in float64, which divide into any of the numbers."""

    nats: float
    tokens: float
    bytes: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float | None:
        """Bits per byte; None where nothing that was scored is text."""
        return bits_per_byte(self.nats, self.bytes) if self.bytes else None


def evaluate(
    sums_of: SumsFunction,
    params: Any,
    components: Iterable[EvalBatches],
    sharding: Sharding,
    *,
    tags: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """`eval/loss` and `eval/bpb` over all components together, `eval/<component>/loss` and `/bpb` for each; tags as `by_tag` says.

    Every held-out token counts once, whatever batch it sits in. The z-loss is a regulariser and no part of these numbers.
    Every process runs the same batches: what a component holds decides their number.

    Args:
        sums_of: the sums over a whole batch, of all processes.
        tags: those of each component, by its name.
    """
    scored = {component.name: _score(sums_of, params, component, sharding) for component in components}
    scored = {name: held_out for name, held_out in scored.items() if held_out.tokens}
    if not scored:
        return {}
    metrics = _numbers("eval", list(scored.values()))
    for name, held_out in scored.items():
        metrics |= _numbers(f"eval/{name}", [held_out])
    return metrics | by_tag(scored, tags or {})


def by_tag(scored: Mapping[str, HeldOut], tags: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`eval/<tag>/loss` and `/bpb` over the components that have a tag, or one below it: `paloma/c4_en` is `paloma` too.

    Where those are several, `/micro_loss` is the same as `/loss`, and `/macro_loss` and `/macro_bpb` are the means of the components'
    own, the latter where each of them has some text.
    """
    members: dict[str, list[HeldOut]] = {}
    for name, held_out in scored.items():
        for level in dict.fromkeys(level for tag in tags.get(name, ()) for level in levels(tag)):
            members.setdefault(level, []).append(held_out)
    metrics: dict[str, float] = {}
    for tag, tagged in members.items():
        metrics |= _numbers(f"eval/{tag}", tagged)
        if len(tagged) > 1:
            metrics[f"eval/{tag}/micro_loss"] = metrics[f"eval/{tag}/loss"]
    return metrics


def levels(tag: str) -> list[str]:
    """A tag and those above it: `a/b/c` is `a`, `a/b` and itself."""
    parts = tag.split("/")
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Cross-entropy of a text in bits for each byte of its UTF-8 form."""
    return nats / (math.log(2) * text_bytes)


def _score(sums_of: SumsFunction, params: Any, component: EvalBatches, sharding: Sharding) -> HeldOut:
    nats = tokens = 0.0
    for index in range(len(component)):
        sums = sums_of(params, place(component.batch(index), sharding))
        nats, tokens = nats + float(sums.cross_entropy), tokens + float(sums.weight)
    return HeldOut(nats, tokens, component.bytes)


def _numbers(prefix: str, members: Sequence[HeldOut]) -> dict[str, float]:
    """Loss and bits per byte of several components together and, where they are several, their means."""
    together = HeldOut(*(sum(column) for column in zip(*members, strict=True)))
    bits = [one.bpb for one in members if one.bpb is not None]
    numbers = {f"{prefix}/loss": together.loss}
    if len(members) > 1:
        numbers[f"{prefix}/macro_loss"] = sum(one.loss for one in members) / len(members)
    if together.bpb is not None:
        numbers[f"{prefix}/bpb"] = together.bpb
        if len(bits) == len(members) > 1:
            numbers[f"{prefix}/macro_bpb"] = sum(bits) / len(members)
    return numbers
