"""Rotary position embedding (Su et al. 2021, "RoFormer"), with the `linear`, `llama3` and `yarn` context-stretching rules.

Shape suffixes: B batch, H heads, S sequence, K head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from model.config import LlamaConfig, RopeConfig


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angular frequencies in radians per token, float64 [K/2], fastest first.

    `linear` divides every frequency by `factor` (Chen et al. 2023, position interpolation). `llama3` divides only
    wavelengths longer than original/low_freq_factor, keeps those shorter than original/high_freq_factor, and
    interpolates between (Llama 3.1 reference code; the same rule as transformers' `rope_type="llama3"`). `yarn` keeps waves that
    turn more than beta_fast times in the original context, divides those that turn less than beta_slow times, and interpolates by
    dimension between (Peng et al. 2023, section 3.2; transformers' `rope_type="yarn"`).
    """
    rope, head_size = config.rope, config.head_size
    frequencies = rope.theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / rope.factor
    if rope.type == "yarn":
        kept = _yarn_kept(rope, head_size)
        return kept * frequencies + (1.0 - kept) * frequencies / rope.factor
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by: under `yarn` scores grow with the context by its square, else 1."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale is None or rope.mscale_all_dim is None:
        return scale(1.0)
    return scale(rope.mscale) / scale(rope.mscale_all_dim)


def _yarn_kept(rope: RopeConfig, head_size: int) -> np.ndarray:
    """How much of each frequency `yarn` keeps, float64 [K/2], falling from 1 to 0 over the dimensions between its two borders."""

    def dimension(turns: float) -> float:
        """Which frequency turns that often in the original context."""
        return head_size * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    return 1.0 - np.clip((np.arange(head_size // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)


def rope_tables(positions_BS: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's angles, times `attention_factor`, two float32 arrays [B, 1, S, K] that broadcast over heads.

    They are computed from `positions_BS` (int, tokens from the start of the document) inside the compiled function:
    as constants they would add megabytes to the program text.
    """
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = positions_BS[:, None, :, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    factor = attention_factor(config.rope)
    if factor == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def apply_rope(x_BHSK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each head by its position's angles; float32 inside, the input's dtype out.

    The pairs are (i, i + K/2), Hugging Face's "rotate half" layout, so exported weights need no permutation.
    """
    cos, sin = tables
    first, second = jnp.split(x_BHSK, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)  # exact in any dtype, and half the memory of float32 in bfloat16
    return (x_BHSK.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x_BHSK.dtype)
