"""Keyed hashes and permutations: the only source of chance in the data order, the same on every machine and numpy version.

Shapes: N indices.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_RANKED = 128
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_INCREMENT = np.uint64(0x632BE59BD9B4E019)


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
            state = _finalize(state + np.asarray(value).astype(np.uint64) * _GOLDEN + _INCREMENT)
    return state


def name_key(name: str) -> np.uint64:
    """The number that stands for a component's name in the hashes."""
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def permute(index_N: np.ndarray, size: np.ndarray | int, key: np.ndarray | np.uint64) -> np.ndarray:
    """A permutation of range(size) chosen by `key`, evaluated at the indices; `size` and `key` broadcast. int64 [N].

    Up to 128: the rank of the index's hash, where every permutation is as likely as any other. Above: an alternating Feistel
    network over the smallest power of two that holds `size`, with cycle walking (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002), whose few bits a round make it too regular for small sizes. Needs 0 <= index < size <= 2**52.
    """
    value_N = np.asarray(index_N).astype(np.uint64)
    size_N = np.broadcast_to(np.asarray(size).astype(np.uint64), value_N.shape)
    key_N = np.broadcast_to(key, value_N.shape)
    small = size_N <= _RANKED
    if not small.any():
        return _walk(value_N, size_N, key if np.ndim(key) == 0 else key_N).astype(np.int64)
    result_N = np.empty(value_N.shape, np.int64)
    result_N[small] = _rank(value_N[small], size_N[small], key_N[small])
    result_N[~small] = _walk(value_N[~small], size_N[~small], key_N[~small])
    return result_N


def _rank(value_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    place = np.arange(size_N.max(), dtype=np.uint64)
    hashes_NR = np.where(place < size_N[:, None], hash64(key_N[:, None], place), np.uint64(2**64 - 1))
    own_N = np.take_along_axis(hashes_NR, value_N[:, None].astype(np.int64), axis=1)
    return (hashes_NR < own_N).sum(axis=1)


def _walk(value_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray | np.uint64) -> np.ndarray:
    # frexp gives the bit length of an integer exactly below 2**53
    bits_N = np.frexp((np.maximum(size_N, 2) - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    low_N = bits_N >> np.uint64(1)
    low_mask_N = (np.uint64(1) << low_N) - np.uint64(1)
    high_mask_N = (np.uint64(1) << (bits_N - low_N)) - np.uint64(1)
    keys_N = [np.broadcast_to(hash64(key_N, number), value_N.shape) for number in range(_ROUNDS)]
    walking = slice(None)
    while True:
        value_N[walking] = _network(
            value_N[walking], low_N[walking], low_mask_N[walking], high_mask_N[walking], [key_N[walking] for key_N in keys_N]
        )
        walking = np.flatnonzero(value_N >= size_N)
        if not len(walking):
            return value_N


def _network(value: np.ndarray, low_bits: np.ndarray, low_mask: np.ndarray, high_mask: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    high, low = value >> low_bits, value & low_mask
    with np.errstate(over="ignore"):
        for number, key in enumerate(keys):
            if number % 2:
                low = low ^ (_finalize(high * _GOLDEN + key) & low_mask)
            else:
                high = high ^ (_finalize(low * _GOLDEN + key) & high_mask)
    return (high << low_bits) | low
