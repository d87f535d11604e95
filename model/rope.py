"""Rotary position embedding (Su et al. 2021, "RoFormer"), with the `linear` and `llama3` context-stretching rules.

Shape suffixes: B batch, H heads, S sequence, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model.config import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angular frequencies in radians per token, float64 [K/2], fastest first.

    `linear` divides every frequency by `factor` (Chen et al. 2023, position interpolation). `llama3` divides only
    wavelengths longer than original/low_freq_factor, keeps those shorter than original/high_freq_factor, and
    interpolates between (Llama 3.1 reference code; the same rule as transformers' `rope_type="llama3"`).
    """
    rope, head_size = config.rope, config.head_size
    frequencies = rope.theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / rope.factor
    return frequencies


def rope_tables(positions_BS: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's angles, two float32 arrays [B, 1, S, K] that broadcast over heads.

    They are computed from `positions_BS` (int, tokens from the start of the document) inside the compiled function:
    as constants they would add megabytes to the program text.
    """
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = positions_BS[:, None, :, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BHSK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each head by its position's angles; float32 inside, the input's dtype out.

    The pairs are (i, i + K/2), Hugging Face's "rotate half" layout, so exported weights need no permutation.
    """
    cos, sin = tables
    first, second = jnp.split(x_BHSK, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)  # exact in any dtype, and half the memory of float32 in bfloat16
    return (x_BHSK.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x_BHSK.dtype)
