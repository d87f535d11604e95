"""The order of tokens when a sequence is split over chips, so that each chip has as much attention to compute as the next.

Under a causal mask late tokens attend to more than early ones. With C chips a sequence is cut into 2 C pieces, and chip i
holds pieces i and 2 C - 1 - i (the "zigzag" of Llama 3, Meta 2024, section 3.3.2).
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

Array = TypeVar("Array", jax.Array, np.ndarray)


def context_size(mesh: Mesh | None) -> int:
    """Chips that one sequence is split over."""
    return 1 if mesh is None else mesh.shape["context"]


def spread_order(x: Array, count: int, *, axis: int) -> Array:
    """`x` with its tokens, in order along `axis`, moved to where `count` chips hold them."""
    return _pieces_taken(x, spread_pieces(count), axis)


def restore_order(x: Array, count: int, *, axis: int) -> Array:
    """The inverse of `spread_order`."""
    return _pieces_taken(x, np.argsort(spread_pieces(count)), axis)


def spread_pieces(count: int) -> np.ndarray:
    """Which of the 2 C pieces stands at each place: 0, 2C-1, 1, 2C-2, ..."""
    return np.stack([np.arange(count), 2 * count - 1 - np.arange(count)], axis=1).reshape(-1)


def _pieces_taken(x: Array, pieces: np.ndarray, axis: int) -> Array:
    if len(pieces) == 2:
        return x  # one chip: its two pieces are in order
    length = x.shape[axis]
    if length % len(pieces):
        raise ValueError(
            f"a sequence of {length} tokens does not divide into the {len(pieces)} pieces of "
            f"train.context_parallel_size={len(pieces) // 2}: make train.train_seq_len a multiple of {len(pieces)} or use fewer chips"
        )
    split = x.reshape(*x.shape[:axis], len(pieces), length // len(pieces), *x.shape[axis + 1 :])
    taken = np.take(split, pieces, axis=axis) if isinstance(split, np.ndarray) else jnp.take(split, pieces, axis=axis)
    return taken.reshape(x.shape)  # pyright: ignore[reportReturnType]  # numpy in, numpy out
