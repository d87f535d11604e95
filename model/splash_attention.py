"""Attention on TPU: the Pallas "splash" kernel that comes with JAX, one call a chip.

Scores never leave the chip's fast memory, and blocks above the diagonal or before the window are skipped. The compiler cannot
split a kernel over chips by itself, so the split is said here: batch and heads are independent; along the sequence each chip has its
own queries and gathers the keys and values of the whole row.

Shape suffixes: B batch, H query heads, G key/value heads, S sequence, K head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.attention_backend import SPLASH_MIN_BLOCK, splash_block_size
from model.context_parallel import context_size, restore_order, spread_order
from model.partitioning import spec
from model.remat import ATTENTION_RESIDUAL


def splash_attention(
    q_BHSK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    segment_ids_BS: jax.Array | None,
    mesh: Mesh | None = None,
    *,
    block_size: int | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, [B, H, S, K] in the queries' dtype.

    Args:
        q_BHSK: rotated queries; scaled by 1/sqrt(K) in here.
        k_BGSK: keys, G a divisor of H.
        v_BGSK: values.
        segment_ids_BS: int32, or None for one segment a row.
        mesh: batch, heads and sequence are split over it by the logical rules.
        block_size: tokens in a block, fewer where it does not divide what a chip has; None takes the table's.
        window: latest tokens that a token attends to, itself among them; None for all.
        interpret: compute the kernel with ordinary operations, on any device.

    Raises:
        ValueError: the tokens of a chip are not a multiple of 128.
    """
    shards = context_size(mesh)
    q_BHSK = (q_BHSK.astype(jnp.float32) / math.sqrt(q_BHSK.shape[-1])).astype(q_BHSK.dtype)
    if segment_ids_BS is None:
        segment_ids_BS = jnp.zeros((q_BHSK.shape[0], q_BHSK.shape[2]), jnp.int32)
    kernel = _kernel(q_BHSK.shape[1], q_BHSK.shape[2], q_BHSK.shape[3], shards, block_size, interpret, window)
    if mesh is None:
        return _local(kernel, q_BHSK, k_BGSK, v_BGSK, segment_ids_BS, segment_ids_BS, shards=1)

    def split(*axes: str | None) -> P:
        return spec(axes, mesh)

    queries, keys = split("batch", "heads", "sequence", None), split("batch", "kv", None, None)
    places = NamedSharding(mesh, split(None, "sequence"))
    return jax.shard_map(
        functools.partial(_local, shards=shards),
        mesh=mesh,
        in_specs=(kernel.manual_sharding_spec(places), queries, keys, keys, split("batch", "sequence"), split("batch", None)),
        out_specs=queries,
        check_vma=False,
    )(kernel, q_BHSK, k_BGSK, v_BGSK, segment_ids_BS, segment_ids_BS)


def _local(
    kernel: splash.SplashAttentionKernel,
    q_BHSK: jax.Array,
    k_BGTK: jax.Array,
    v_BGTK: jax.Array,
    segments_BS: jax.Array,
    segments_BT: jax.Array,
    *,
    shards: int,
) -> jax.Array:
    """One chip's queries S against the keys T of whole rows, which arrive spread and are put in order."""
    k_BGTK, v_BGTK = (restore_order(x, shards, axis=2) for x in (k_BGTK, v_BGTK))
    segments = splash.SegmentIds(segments_BS, restore_order(segments_BT, shards, axis=1))
    output = jax.vmap(kernel)(q_BHSK, k_BGTK, v_BGTK, segments)
    assert isinstance(output, jax.Array)  # the kernel was not asked for its residuals
    return output


def _kernel(
    num_heads: int, seq_len: int, head_size: int, shards: int, block_size: int | None, interpret: bool, window: int | None = None
) -> splash.SplashAttentionKernel:
    local = seq_len // shards
    block = splash_block_size(local, head_size, block_size, shards)
    if block is None:
        raise ValueError(
            f"{local} tokens a chip (sequence {seq_len} over train.context_parallel_size={shards}) are no multiple of {SPLASH_MIN_BLOCK}: "
            f"change the sequence length or use model.attn_backend='plain'"
        )
    shape = (seq_len, seq_len)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    # What position each query has in its row: the kernel masks by it, so queries may stand in any order.
    mask.q_sequence = spread_order(np.arange(seq_len, dtype=np.int32), shards, axis=0)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=ATTENTION_RESIDUAL,
        interpret=interpret,
    )
