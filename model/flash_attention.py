"""Causal, segment-masked, grouped-query attention whose memory grows linearly with the sequence, in plain XLA operations.

For devices without a kernel of their own; on TPU `model.splash_attention` computes the same. Both directions go through the
sequence in square blocks, those above the diagonal or before the window left out: forward by online softmax
(Milakov & Gimelshein 2018), backward with the scores computed again from the saved logsumexp, in five products (FlashAttention-2,
Dao 2023).

Shape suffixes: B batch, H query heads, G key/value heads, R = H / G query heads per group, S sequence (of queries, or one
block of it), T sequence (of keys), K head width.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.attention_backend import FLASH_MIN_BLOCK, flash_block_size
from model.remat import ATTENTION_RESIDUAL

# Finite, so that a row whose keys seen so far are all masked gives exp(0), which later blocks scale to zero, and not NaN.
MASKED = -1e30


def flash_attention(
    q_BHSK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    block_size: int | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attention output [B, H, S, K] in the queries' dtype; scores, softmax and all sums are float32.

    Args:
        q_BHSK: queries; scores are scaled by 1/sqrt(K) in here.
        k_BGSK: keys, G a divisor of H.
        v_BGSK: values.
        segment_ids_BS: int32, or None for one segment a row.
        block_size: tokens in a block; None, or where it does not divide the sequence, takes the table's.
        window: latest tokens that a token attends to, itself among them; None for all.

    Raises:
        ValueError: no block divides the sequence.
    """
    batch, num_heads, seq_len, head_size = q_BHSK.shape
    num_groups = k_BGSK.shape[1]
    block = flash_block_size(seq_len, block_size)
    if block is None:
        raise ValueError(f"the sequence of {seq_len} tokens is not a multiple of {FLASH_MIN_BLOCK}: pad it or use plain_attention")
    if segment_ids_BS is None:
        segment_ids_BS = jnp.zeros((batch, seq_len), jnp.int32)
    # Query head h reads key/value head h // R.
    q_BGRSK = q_BHSK.reshape(batch, num_groups, num_heads // num_groups, seq_len, head_size)
    return _flash(_Blocks(block, window), q_BGRSK, k_BGSK, v_BGSK, segment_ids_BS).reshape(q_BHSK.shape)


class _Blocks(NamedTuple):
    """How the square of scores is cut, and which of its blocks hold a score that counts."""

    size: int
    window: int | None

    def first(self, row: jax.Array) -> jax.Array | int:
        """The first block of keys that block `row` of queries looks at; the last is `row`."""
        if self.window is None:
            return 0
        return jnp.maximum(row * self.size - (self.window - 1), 0) // self.size


def _primal(blocks: _Blocks, q_BGRSK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, segments_BS: jax.Array) -> jax.Array:
    return _forward(blocks, q_BGRSK, k_BGTK, v_BGTK, segments_BS)[0]


def _forward(
    blocks: _Blocks, q_BGRSK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, segments_BS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and what the backward pass needs: the inputs, the output, and float32 logsumexp [B, G, R, S] of the scores."""
    block = blocks.size

    def query_block(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BGRSK_row = _at(q_BGRSK, row, block, axis=3)

        def key_block(column: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            """The running maximum, normaliser and output with one more block of keys."""
            maximum, normaliser, output = carry
            v = _at(v_BGTK, column, block, axis=2)
            scores = _scores(q_BGRSK_row, _at(k_BGTK, column, block, axis=2), segments_BS, row, column, blocks.window)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            decay = jnp.exp(maximum - new_maximum)
            update = jnp.einsum("bgrst,bgtk->bgrsk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_maximum, normaliser * decay + weights.sum(axis=-1), output * decay[..., None] + update

        zeros = jnp.zeros(q_BGRSK_row.shape[:-1], jnp.float32)
        start = (zeros + MASKED, zeros, jnp.zeros(q_BGRSK_row.shape, jnp.float32))
        maximum, normaliser, output = jax.lax.fori_loop(blocks.first(row), row + 1, key_block, start)
        return (output / normaliser[..., None]).astype(q_BGRSK.dtype), maximum + jnp.log(normaliser)

    outputs, logsumexps = jax.lax.map(query_block, jnp.arange(q_BGRSK.shape[3] // block))
    output_BGRSK = checkpoint_name(jnp.moveaxis(outputs, 0, 3).reshape(q_BGRSK.shape), ATTENTION_RESIDUAL)
    logsumexp_BGRS = checkpoint_name(jnp.moveaxis(logsumexps, 0, 3).reshape(q_BGRSK.shape[:-1]), ATTENTION_RESIDUAL)
    return output_BGRSK, (q_BGRSK, k_BGTK, v_BGTK, segments_BS, output_BGRSK, logsumexp_BGRS)


def _backward(blocks: _Blocks, saved: tuple[jax.Array, ...], d_output_BGRSK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    block = blocks.size
    q_BGRSK, k_BGTK, v_BGTK, segments_BS, output_BGRSK, logsumexp_BGRS = saved
    scale = 1 / math.sqrt(q_BGRSK.shape[-1])
    # Of each query, what the softmax takes from every gradient of its probabilities: their mean under the probabilities.
    mean_BGRS = (d_output_BGRSK.astype(jnp.float32) * output_BGRSK.astype(jnp.float32)).sum(axis=-1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def query_block(carry: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q, d_output, logsumexp, mean = (_at(x, row, block, axis=3) for x in (q_BGRSK, d_output_BGRSK, logsumexp_BGRS, mean_BGRS))

        def key_block(column: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            """The gradients of keys and values so far and of this block of queries, with one more block of keys."""
            d_k_BGTK, d_v_BGTK, d_q = carry
            k, v = _at(k_BGTK, column, block, axis=2), _at(v_BGTK, column, block, axis=2)
            weights = jnp.exp(_scores(q, k, segments_BS, row, column, blocks.window) - logsumexp[..., None])
            d_weights = product("bgrsk,bgtk->bgrst", d_output, v)
            d_scores = (weights * (d_weights - mean[..., None]) * scale).astype(q.dtype)
            d_v_BGTK = _added(d_v_BGTK, product("bgrst,bgrsk->bgtk", weights.astype(q.dtype), d_output), column, block)
            d_k_BGTK = _added(d_k_BGTK, product("bgrst,bgrsk->bgtk", d_scores, q), column, block)
            return d_k_BGTK, d_v_BGTK, d_q + product("bgrst,bgtk->bgrsk", d_scores, k)

        columns = (blocks.first(row), row + 1)
        d_k_BGTK, d_v_BGTK, d_q = jax.lax.fori_loop(*columns, key_block, (*carry, jnp.zeros(q.shape, jnp.float32)))
        return (d_k_BGTK, d_v_BGTK), d_q.astype(q.dtype)

    start = (jnp.zeros(k_BGTK.shape, jnp.float32), jnp.zeros(v_BGTK.shape, jnp.float32))
    (d_k_BGTK, d_v_BGTK), d_q_blocks = jax.lax.scan(query_block, start, jnp.arange(q_BGRSK.shape[3] // block))
    d_q_BGRSK = jnp.moveaxis(d_q_blocks, 0, 3).reshape(q_BGRSK.shape)
    return d_q_BGRSK, d_k_BGTK.astype(k_BGTK.dtype), d_v_BGTK.astype(v_BGTK.dtype), None


_flash = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_flash.defvjp(_forward, _backward)


def _scores(
    q_BGRSK: jax.Array, k_BGTK: jax.Array, segments_BS: jax.Array, row: jax.Array, column: jax.Array, window: int | None
) -> jax.Array:
    """Float32 scores [B, G, R, S, T] of one block of queries and one of keys, MASKED where a query must not look."""
    block = q_BGRSK.shape[3]
    places = jnp.arange(block)
    seen_ST = row * block + places[:, None] >= column * block + places
    if window is not None:
        seen_ST &= row * block + places[:, None] < column * block + places + window
    q_segments, k_segments = _at(segments_BS, row, block, axis=1), _at(segments_BS, column, block, axis=1)
    mask_BST = seen_ST & (q_segments[:, :, None] == k_segments[:, None, :])
    scores = jnp.einsum("bgrsk,bgtk->bgrst", q_BGRSK, k_BGTK, preferred_element_type=jnp.float32) / math.sqrt(q_BGRSK.shape[-1])
    return jnp.where(mask_BST[:, None, None], scores, MASKED)


def _at(x: jax.Array, index: jax.Array, block: int, *, axis: int) -> jax.Array:
    """Block `index` of an axis."""
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _added(total_BGTK: jax.Array, part_BGTK: jax.Array, index: jax.Array, block: int) -> jax.Array:
    """`total_BGTK` with a block's part added in its place."""
    return jax.lax.dynamic_update_slice_in_dim(total_BGTK, _at(total_BGTK, index, block, axis=2) + part_BGTK, index * block, axis=2)
