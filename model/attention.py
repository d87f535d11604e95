"""Causal, segment-masked, grouped-query attention: one entry point, three ways to compute it.

| `attn_backend` | where                    | memory in the sequence | module                   |
|----------------|--------------------------|------------------------|--------------------------|
| `splash`       | TPU                      | linear                 | `model.splash_attention` |
| `flash`        | anywhere                 | linear                 | `model.flash_attention`  |
| `plain`        | anywhere, the reference  | quadratic              | here                     |

Shape suffixes: B batch, H query heads, G key/value heads, S sequence (queries), T sequence (keys), K head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model.attention_backend import attention_window, choose_backend
from model.config import LlamaConfig
from model.context_parallel import context_size, restore_order, spread_order
from model.flash_attention import MASKED, flash_attention
from model.mesh import platform_of


def attention(
    q_BHSK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    segment_ids_BS: jax.Array | None,
    config: LlamaConfig,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Attention output [B, H, S, K] in the queries' dtype; scores and softmax are float32.

    A token attends to itself and to earlier tokens with the same segment id (None: the whole row is one segment), of these to
    the latest `config.sliding_window`, itself among them.
    Under a mesh whose `context` axis is larger than 1, tokens come and go in the order of `model.context_parallel`.

    Raises:
        ValueError: `config.attn_backend` names a form that cannot compute this shape.
    """
    backend, window = choose_backend(config, q_BHSK.shape[2], platform_of(mesh)), attention_window(config, q_BHSK.shape[2])
    block_size = config.flash_attention_block_size
    if backend == "splash":
        from model.splash_attention import splash_attention  # importing the TPU kernels takes a while, and only a TPU has them

        return splash_attention(q_BHSK, k_BGSK, v_BGSK, segment_ids_BS, mesh, block_size=block_size, window=window)
    form = functools.partial(plain_attention, window=window)
    if backend == "flash":
        form = functools.partial(flash_attention, block_size=block_size, window=window)
    count = context_size(mesh)
    if count == 1:
        return form(q_BHSK, k_BGSK, v_BGSK, segment_ids_BS)
    q, k, v = (restore_order(x, count, axis=2) for x in (q_BHSK, k_BGSK, v_BGSK))
    segments = None if segment_ids_BS is None else restore_order(segment_ids_BS, count, axis=1)
    return spread_order(form(q, k, v, segments), count, axis=2)


def plain_attention(
    q_BHSK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, segment_ids_BS: jax.Array | None = None, window: int | None = None
) -> jax.Array:
    """Attention with the whole [B, H, S, S] score matrix in memory; the reference for every other form."""
    seq_len = q_BHSK.shape[2]
    mask = jnp.tril(jnp.ones((seq_len, seq_len), bool))[None]
    if window is not None:
        mask = jnp.triu(mask, 1 - window)
    if segment_ids_BS is not None:
        mask = mask & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
    return masked_attention(q_BHSK, k_BGSK, v_BGSK, mask)


def masked_attention(q_BHSK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, mask_BST: jax.Array) -> jax.Array:
    """Attention where query s sees key t exactly if `mask_BST` (bool, B or 1 rows) is true; every query needs a key.

    Returns [B, H, S, K] in the queries' dtype.
    """
    # Repeating keys and values here beats grouped products by a fifth on CPU, and they are small beside the scores.
    repeats = q_BHSK.shape[1] // k_BGTK.shape[1]
    k_BHTK, v_BHTK = (jnp.repeat(x, repeats, axis=1) for x in (k_BGTK, v_BGTK))
    scores = jnp.einsum("bhsk,bhtk->bhst", q_BHSK, k_BHTK, preferred_element_type=jnp.float32) / math.sqrt(q_BHSK.shape[-1])
    probabilities = jax.nn.softmax(jnp.where(mask_BST[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("bhst,bhtk->bhsk", probabilities.astype(v_BHTK.dtype), v_BHTK)
