"""The order of training rows: which window of which component is row i, as arithmetic, without state or tables.

Row i is a pure function of (components, weights, seed, i). Version 1 of the order:
  mixture      block b = i // 2048 holds round((b + 1) * 2048 * W_c) - round(b * 2048 * W_c) rows of the components up to
               c, where W_c is their cumulative share, in exact integer arithmetic: error diffusion, so that any positive
               weight gets its share in the long run; a keyed permutation places the rows inside the block
  windows      row k of a component is window p(k mod n) of epoch k // n, with p a permutation keyed by the seed, the
               component's name and the epoch; windows start at a keyed offset, so cut points move every epoch
A component's own sequence of windows depends on its name alone: adding, dropping or re-weighting another does not move it.

Shapes: N rows asked for, C components.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

ORDER_VERSION = 1
BLOCK = 2048

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# which question a hash answers, so that the answers are independent
_PLACE, _WINDOW, _OFFSET = 1, 2, 3


def _finalize(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*values: int | np.integer | np.ndarray) -> np.ndarray:
    """A 64-bit hash of the values, elementwise over their broadcast shape, uint64."""
    state = np.asarray(_GOLDEN)
    with np.errstate(over="ignore"):
        for value in values:
            state = _finalize(state + np.asarray(value).astype(np.uint64) * _GOLDEN + np.uint64(0x632BE59BD9B4E019))
    return state


def name_key(name: str) -> np.uint64:
    """The number that stands for a component's name in the hashes."""
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def permute(index_N: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """A permutation of range(size) chosen by `key`, evaluated at the indices; `size` and `key` broadcast. int64 [N].

    A balanced Feistel network with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    Needs 0 <= index < size <= 2**52.
    """
    value_N = np.asarray(index_N).astype(np.uint64)
    size_N = np.broadcast_to(np.asarray(size).astype(np.uint64), value_N.shape)
    key_N = np.broadcast_to(key, value_N.shape)
    # frexp gives the bit length of an integer exactly below 2**53
    bits_N = np.frexp((np.maximum(size_N, 2) - np.uint64(1)).astype(np.float64))[1]
    half_N = ((np.maximum(bits_N, 2) + 1) // 2).astype(np.uint64)
    mask_N = (np.uint64(1) << half_N) - np.uint64(1)
    outside = np.ones(value_N.shape, bool)
    while outside.any():
        half, mask, round_key = half_N[outside], mask_N[outside], key_N[outside]
        left, right = value_N[outside] >> half, value_N[outside] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (hash64(round_key, number, right) & mask)
        value_N[outside] = (left << half) | right
        outside = value_N >= size_N
    return value_N.astype(np.int64)


@dataclass(frozen=True)
class Component:
    """What the order needs to know of a component: its name, its weight (any positive scale), its number of tokens."""

    name: str
    weight: float
    num_tokens: int


class RowOrder:
    """Maps row numbers to (component, first token of its window of seq_len + 1 tokens)."""

    def __init__(self, components: Sequence[Component], seq_len: int, seed: int) -> None:
        """Raises ValueError for a weight that is not positive, or a component shorter than one window."""
        if not components:
            raise ValueError("the mixture has no component with a positive weight; give at least one in mixture.weights")
        for component in components:
            if not component.weight > 0:
                raise ValueError(f"component {component.name!r} has weight {component.weight}; a training weight must be above 0")
            if component.num_tokens < seq_len + 1:
                raise ValueError(
                    f"component {component.name!r} has {component.num_tokens} training tokens, fewer than one window of "
                    f"seq_len + 1 = {seq_len + 1}; lower seq_len to {max(component.num_tokens - 1, 0)} or less, add text to it, "
                    "or drop it from the mixture"
                )
        self.names = tuple(component.name for component in components)
        self.seq_len = seq_len
        self._seed = seed
        shares = [Fraction(component.weight) for component in components]
        total = sum(shares)
        cumulative = [sum(shares[: index + 1], Fraction(0)) / total for index in range(len(shares))]
        self._cumulative = [(share.numerator, share.denominator) for share in cumulative]
        self._tokens_C = np.array([component.num_tokens for component in components], np.int64)
        # one window is held back so that every offset fits; a component of less than two windows has one, and fewer offsets
        self._windows_C = np.maximum(self._tokens_C // seq_len - 1, 1)
        self._offsets_C = np.minimum(self._tokens_C - self._windows_C * seq_len, seq_len)
        self._names_C = np.array([name_key(component.name) for component in components], np.uint64)
        self._plans: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def rows_before(self, row: int) -> np.ndarray:
        """How many of the rows [0, row) each component has, int64 [C], for a row on a block's border."""
        edges = [0] + [(2 * row * numerator + denominator) // (2 * denominator) for numerator, denominator in self._cumulative]
        return np.diff(np.array(edges, np.int64))

    def locate(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(component index [N], first token of the window in that component's stream [N]), both int64."""
        block_N, within_N = np.divmod(np.asarray(rows_N, np.int64), BLOCK)
        component_N, start_N = np.empty_like(block_N), np.empty_like(block_N)
        for block in np.unique(block_N):
            inside = block_N == block
            component_B, start_B = self._plan(int(block))
            component_N[inside], start_N[inside] = component_B[within_N[inside]], start_B[within_N[inside]]
        return component_N, start_N

    def planned_rows(self, num_rows: int) -> Mapping[str, int]:
        """How many of the first `num_rows` rows each component gets."""
        border, rest = divmod(num_rows, BLOCK)
        counts = self.rows_before(border * BLOCK)
        if rest:
            counts = counts + np.bincount(self._plan(border)[0][:rest], minlength=len(self.names))
        return {name: int(count) for name, count in zip(self.names, counts, strict=True)}

    def epoch_tokens(self) -> Mapping[str, int]:
        """Training tokens of each component: reading as many is one epoch."""
        return {name: int(count) for name, count in zip(self.names, self._tokens_C, strict=True)}

    def _plan(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Component and window start of the block's rows. Kept, since a block at once costs little more than a batch."""
        if block not in self._plans:
            if len(self._plans) >= 4:
                self._plans.popitem(last=False)
            self._plans[block] = self._compute(block)
        return self._plans[block]

    def _compute(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before_C = self.rows_before(block * BLOCK)
        end_C = np.cumsum(self.rows_before((block + 1) * BLOCK) - before_C)
        begin_C = np.concatenate([[0], end_C[:-1]])
        place = permute(np.arange(BLOCK), BLOCK, hash64(self._seed, _PLACE, block))
        component = np.searchsorted(end_C, place, side="right")
        epoch, nth = np.divmod(before_C[component] + place - begin_C[component], self._windows_C[component])
        name = self._names_C[component]
        window = permute(nth, self._windows_C[component], hash64(self._seed, _WINDOW, name, epoch))
        offset = (hash64(self._seed, _OFFSET, name, epoch) % self._offsets_C[component].astype(np.uint64)).astype(np.int64)
        return component, offset + window * self.seq_len
