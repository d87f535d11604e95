"""Causal, segment-masked, grouped-query attention whose memory grows linearly with the sequence, in plain XLA operations.

For devices without a kernel of their own; on TPU `model.splash_attention` computes the same.

Shape suffixes: B batch, H query heads, G key/value heads, R = H / G query heads per group, S sequence (queries),
T sequence (keys), K head width, N blocks.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from model.attention_backend import FLASH_BLOCK_SIZE

# Finite, so that a row whose keys seen so far are all masked gives exp(0), which later blocks scale to zero, and not NaN.
MASKED = -1e30


def flash_attention(
    q_BHSK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    block_size: int = FLASH_BLOCK_SIZE,
) -> jax.Array:
    """Attention output [B, H, S, K] by online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).

    Each block of queries runs over the key blocks at or below the diagonal only, and both levels recompute their
    scores in the backward pass, so memory is O(S) and the work half the square.

    Raises:
        ValueError: `block_size` does not divide the sequence.
    """
    batch, num_heads, seq_len, head_size = q_BHSK.shape
    num_groups = k_BGSK.shape[1]
    if seq_len % block_size:
        raise ValueError(f"the sequence of {seq_len} tokens is not a multiple of block_size={block_size}: pad it or use plain_attention")
    if segment_ids_BS is None:
        segment_ids_BS = jnp.zeros((batch, seq_len), jnp.int32)
    # Query head h reads key/value head h // R.
    q_BGRSK = q_BHSK.reshape(batch, num_groups, num_heads // num_groups, seq_len, head_size)
    outputs = []
    for start in range(0, seq_len, block_size):
        rows, seen = slice(start, start + block_size), slice(0, start + block_size)
        outputs.append(
            _query_block(q_BGRSK[:, :, :, rows], k_BGSK[:, :, seen], v_BGSK[:, :, seen], segment_ids_BS[:, rows], segment_ids_BS[:, seen])
        )
    return jnp.concatenate(outputs, axis=3).reshape(q_BHSK.shape)


@jax.checkpoint
def _query_block(q_BGRSK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, q_segments_BS: jax.Array, k_segments_BT: jax.Array) -> jax.Array:
    """Output [B, G, R, S, K] of the last S of T positions, one key block of S positions at a time."""
    block, start = q_BGRSK.shape[3], k_BGTK.shape[2] - q_BGRSK.shape[3]
    query_positions = start + jnp.arange(block)

    @jax.checkpoint
    def key_block(carry: tuple[jax.Array, jax.Array, jax.Array], keys: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        """The running maximum, normaliser and output with one more block of keys."""
        maximum, normaliser, output = carry
        k, v, segments, index = keys
        causal = query_positions[:, None] >= index * block + jnp.arange(block)
        mask = causal & (q_segments_BS[:, :, None] == segments[:, None, :])
        scores = jnp.einsum("bgrsk,bgtk->bgrst", q_BGRSK, k, preferred_element_type=jnp.float32) / math.sqrt(q_BGRSK.shape[-1])
        scores = jnp.where(mask[:, None, None], scores, MASKED)
        # The result does not depend on the maximum, so no gradient need flow through it.
        new_maximum = jax.lax.stop_gradient(jnp.maximum(maximum, scores.max(axis=-1)))
        weights = jnp.exp(scores - new_maximum[..., None])
        decay = jnp.exp(maximum - new_maximum)
        update = jnp.einsum("bgrst,bgtk->bgrsk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (new_maximum, normaliser * decay + weights.sum(axis=-1), output * decay[..., None] + update), None

    zeros = jnp.zeros(q_BGRSK.shape[:-1], jnp.float32)
    blocks = functools.partial(_blocks_first, block=block)
    keys = (blocks(k_BGTK, axis=2), blocks(v_BGTK, axis=2), blocks(k_segments_BT, axis=1), jnp.arange(start // block + 1))
    carry = (zeros + MASKED, zeros, jnp.zeros(q_BGRSK.shape, jnp.float32))
    (_, normaliser, output), _ = jax.lax.scan(key_block, carry, keys)
    return (output / normaliser[..., None]).astype(q_BGRSK.dtype)


def _blocks_first(x: jax.Array, *, axis: int, block: int) -> jax.Array:
    """Splits `axis` into N blocks of `block` positions and moves N to the front."""
    split = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0)
