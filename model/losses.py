"""Next-token loss with the output head fused in: the [B, S, V] logits never exist.

One pass over chunks of tokens computes each chunk's logits, its loss and both gradients, and throws the logits away, so
the backward pass only scales what is stored. Under a mesh the pass runs once per device on its own rows and its own
slice of the vocabulary: the head is gathered once and its gradient reduced once.

Shape suffixes: B batch, S sequence, D hidden width, V vocabulary (a device's slice of it inside the local functions),
C tokens in one chunk, N chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from model.partitioning import live_axes

# libtpu scatters arrays up to about 128 MB; above, it sums them everywhere and cuts, twice the bytes.
SCATTER_COLUMNS = 8192


class LossSums(NamedTuple):
    """Float32 scalar sums over the tokens of a batch, in nats; divide by `weight` for a mean per token.

    Only `loss` carries a gradient: the other three are for the log.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    z_loss: jax.Array
    weight: jax.Array


@dataclass(frozen=True)
class _Plan:
    """What is static about one call: the constants and the mesh axes each array is split over."""

    z_loss_weight: float
    chunk_size: int
    vocab_size: int  # columns of the head from here up are padding
    has_padding: bool
    logit_soft_cap: float | None
    gradient_dtype: DTypeLike  # in which the parts of the head's gradient cross between devices
    mesh: Mesh | None
    batch_axes: tuple[str, ...] = ()  # over which rows are split
    sequence_axes: tuple[str, ...] = ()  # over which the tokens of a row are split
    hidden_axes: tuple[str, ...] = ()  # over which the rows of the head are split
    vocab_axis: str | None = None  # over which the columns of the head are split


def next_token_loss(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    loss_weights_BS: jax.Array,
    *,
    z_loss_weight: float,
    chunk_size: int,
    vocab_size: int | None = None,
    logit_soft_cap: float | None = None,
    gradient_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> LossSums:
    """Sums over tokens of w * (ce + z), w * ce, w * z and w, with ce = lse - logit[y] and z = z_loss_weight * lse^2.

    lse is the float32 logsumexp of the token's logits; the z term is PaLM's (Chowdhery et al. 2022). The logits are
    the product in the dtype of `hidden_BSD`, summed in float32, then cap * tanh(logit / cap) where there is a cap
    (Gemma 2, 2024, section 2). Differentiable in `hidden_BSD` and `head_DV`, through
    `loss` alone.

    Args:
        hidden_BSD: output of `model.llama.hidden_states`.
        head_DV: output of `model.llama.output_head`, float32.
        targets_BS: int; a target outside [0, V) makes the sums NaN unless its weight is zero.
        loss_weights_BS: weight of each token, zero where there is no loss.
        z_loss_weight: zero switches the z term off.
        chunk_size: tokens per chunk on each device; any remainder is padded with weight zero.
        vocab_size: columns of the head from here up are padding and take no part; None: there are none.
        logit_soft_cap: the cap; None leaves the logits as they are.
        gradient_dtype: dtype in which the parts of the head's gradient are summed over devices; on one, float32.
        mesh: a mesh of `model.partitioning.make_mesh`, or None for one device.

    Raises:
        ValueError: shapes disagree, `chunk_size` is below 1, or the mesh does not divide batch or vocabulary.
    """
    if targets_BS.shape != hidden_BSD.shape[:2] or loss_weights_BS.shape != hidden_BSD.shape[:2]:
        raise ValueError(
            f"targets {targets_BS.shape} and loss weights {loss_weights_BS.shape} must have the hidden states' [B, S] "
            f"{hidden_BSD.shape[:2]}"
        )
    if chunk_size < 1:
        raise ValueError(f"model.cross_entropy_block_size={chunk_size}: use at least one token per chunk")
    vocab_size = head_DV.shape[1] if vocab_size is None else vocab_size
    plan = _Plan(z_loss_weight, chunk_size, vocab_size, vocab_size < head_DV.shape[1], logit_soft_cap, gradient_dtype, mesh)
    if mesh is not None:
        plan = _split(plan, mesh, hidden_BSD.shape, head_DV.shape)
    return _fused_loss(plan, hidden_BSD, head_DV, targets_BS, loss_weights_BS.astype(jnp.float32))


def _split(plan: _Plan, mesh: Mesh, hidden_shape: tuple[int, ...], head_shape: tuple[int, ...]) -> _Plan:
    batch_axes, sequence_axes, hidden_axes = (live_axes(name, mesh) for name in ("batch", "sequence", "embed"))
    for size, axes, what in ((hidden_shape[0], batch_axes, "batch"), (hidden_shape[1], sequence_axes, "sequence")):
        ways = math.prod(mesh.shape[name] for name in axes)
        if size % ways:
            raise ValueError(
                f"the {what} of {size} is not a multiple of the {ways} devices on the mesh axes {', '.join(axes)}: "
                f"change train.{'train_batch_size' if what == 'batch' else 'train_seq_len'} or the mesh"
            )
    if head_shape[1] % mesh.shape["tensor"]:
        raise ValueError(
            f"the head's {head_shape[1]} columns are not a multiple of the mesh axis tensor={mesh.shape['tensor']}: "
            f"raise model.pad_vocab_to_multiple_of or change train.tensor_parallel_size"
        )
    if head_shape[0] % math.prod(mesh.shape[name] for name in hidden_axes):
        hidden_axes = ()
    vocab_axis = "tensor" if mesh.shape["tensor"] > 1 else None
    return dataclasses.replace(plan, batch_axes=batch_axes, sequence_axes=sequence_axes, hidden_axes=hidden_axes, vocab_axis=vocab_axis)


def _fused_loss_primal(plan: _Plan, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> LossSums:
    return _over_devices(plan, hidden, head, targets, weights, with_gradients=False)[0]


def _fused_loss_forward(
    plan: _Plan, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[LossSums, tuple[jax.Array, ...]]:
    return _over_devices(plan, hidden, head, targets, weights, with_gradients=True)


def _fused_loss_backward(
    plan: _Plan, gradients: tuple[jax.Array, jax.Array], cotangents: LossSums
) -> tuple[jax.Array, jax.Array, None, None]:
    del plan
    # Scaled in float32: a bfloat16 factor would be off by the same relative error for every token.
    d_hidden, d_head = ((gradient.astype(jnp.float32) * cotangents.loss).astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_head, None, None


_fused_loss = jax.custom_vjp(_fused_loss_primal, nondiff_argnums=(0,))
_fused_loss.defvjp(_fused_loss_forward, _fused_loss_backward)


def _over_devices(
    plan: _Plan, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, with_gradients: bool
) -> tuple[LossSums, tuple[jax.Array, ...]]:
    """The sums and, if wanted, the gradients of `loss` in hidden states and head (else an empty tuple)."""
    local = functools.partial(_local_loss, plan, with_gradients=with_gradients)
    if plan.mesh is not None:
        tokens = hidden_spec = P(plan.batch_axes, plan.sequence_axes)
        head_spec = P(plan.hidden_axes, plan.vocab_axis)
        gradient_specs = (hidden_spec, head_spec) if with_gradients else ()
        local = jax.shard_map(
            local,
            mesh=plan.mesh,
            in_specs=(hidden_spec, head_spec, tokens, tokens),
            out_specs=(P(), gradient_specs),
            check_vma=False,
        )
    return local(hidden, head, targets, weights)


def _local_loss(
    plan: _Plan, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, with_gradients: bool
) -> tuple[LossSums, tuple[jax.Array, ...]]:
    """One device's share of `_over_devices`, reduced over the devices that hold the other shares."""
    head_DV = head.astype(hidden.dtype)
    if plan.hidden_axes:
        head_DV = jax.lax.all_gather(head_DV, plan.hidden_axes, axis=0, tiled=True)
    chunk = min(plan.chunk_size, targets.size)

    def chunk_step(carry: tuple[LossSums, jax.Array], tokens: tuple[jax.Array, ...]) -> tuple[tuple[LossSums, jax.Array], Any]:
        sums, d_head = carry
        x_CD, targets_C, weights_C = tokens
        chunk_sums, d_logits_CV = _chunk_loss(plan, x_CD, head_DV, targets_C, weights_C)
        sums = jax.tree.map(jnp.add, sums, chunk_sums)
        if not with_gradients:
            return (sums, d_head), None
        d_logits_CV = d_logits_CV.astype(x_CD.dtype)
        d_head = d_head + jnp.einsum("cd,cv->dv", x_CD, d_logits_CV, preferred_element_type=jnp.float32)
        d_x_CD = jnp.einsum("cv,dv->cd", d_logits_CV, head_DV, preferred_element_type=jnp.float32)
        # Slices of the vocabulary are still to be summed: keep float32 until then.
        return (sums, d_head), d_x_CD if plan.vocab_axis else d_x_CD.astype(x_CD.dtype)

    zero = jnp.zeros((), jnp.float32)
    d_head = jnp.zeros(head_DV.shape if with_gradients else (), jnp.float32)
    tokens = (
        _chunks(hidden.reshape(-1, hidden.shape[-1]), chunk),
        _chunks(targets.reshape(-1), chunk),
        _chunks(weights.reshape(-1), chunk),
    )
    (sums, d_head), d_hidden_NCD = jax.lax.scan(chunk_step, (LossSums(zero, zero, zero, zero), d_head), tokens)
    if plan.batch_axes + plan.sequence_axes:
        sums = jax.lax.psum(sums, plan.batch_axes + plan.sequence_axes)
    if not with_gradients:
        return sums, ()
    d_hidden = d_hidden_NCD.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    if plan.vocab_axis:
        d_hidden = jax.lax.psum(d_hidden, plan.vocab_axis)
    return sums, (d_hidden.astype(hidden.dtype), _reduce_head_gradient(plan, d_head).astype(head.dtype))


def _chunk_loss(plan: _Plan, x_CD: jax.Array, head_DV: jax.Array, targets_C: jax.Array, weights_C: jax.Array) -> tuple[LossSums, jax.Array]:
    """One chunk's sums, and the gradient of its loss in this device's logits, float32 [C, V]."""
    axis = plan.vocab_axis
    raw_CV = jnp.einsum("cd,dv->cv", x_CD, head_DV, preferred_element_type=jnp.float32)
    cap = plan.logit_soft_cap
    logits_CV = raw_CV if cap is None else cap * jnp.tanh(raw_CV / cap)
    first_column = raw_CV.shape[1] * jax.lax.axis_index(axis) if axis else 0
    columns_V = jnp.arange(raw_CV.shape[1])
    known_CV = jnp.where(first_column + columns_V < plan.vocab_size, logits_CV, -jnp.inf) if plan.has_padding else logits_CV
    maximum_C = known_CV.max(axis=-1)
    if axis:
        maximum_C = jax.lax.pmax(maximum_C, axis)
    exponentials_CV = jnp.exp(known_CV - maximum_C[:, None])
    place_C = targets_C - first_column
    here_C = (place_C >= 0) & (place_C < raw_CV.shape[1]) & (targets_C < plan.vocab_size)
    target_logit_C = jnp.take_along_axis(logits_CV, place_C[:, None], axis=1, mode="clip")[:, 0]
    partial = (exponentials_CV.sum(axis=-1), jnp.where(here_C, target_logit_C, 0.0), here_C.astype(jnp.int32))
    normaliser_C, target_logit_C, found_C = jax.lax.psum(partial, axis) if axis else partial
    here_CV = here_C[:, None] & (place_C[:, None] == columns_V)

    logsumexp_C = maximum_C + jnp.log(normaliser_C)
    cross_entropy_C = jnp.where(found_C > 0, logsumexp_C - target_logit_C, jnp.nan)
    z_loss_C = plan.z_loss_weight * logsumexp_C**2
    # A token of weight zero may have any target.
    cross_entropy, z_loss = (jnp.where(weights_C != 0, weights_C * term, 0.0).sum() for term in (cross_entropy_C, z_loss_C))
    probabilities_scale_C = (1.0 + 2.0 * plan.z_loss_weight * logsumexp_C) / normaliser_C
    d_logits_CV = (exponentials_CV * probabilities_scale_C[:, None] - here_CV) * weights_C[:, None]
    if cap is not None:
        d_logits_CV = d_logits_CV * (1.0 - (logits_CV / cap) ** 2)
    return LossSums(cross_entropy + z_loss, cross_entropy, z_loss, weights_C.sum()), d_logits_CV


def _chunks(tokens: jax.Array, chunk: int) -> jax.Array:
    """[N, C, ...]: the leading axis in chunks, zeros filling up the last."""
    padding = -tokens.shape[0] % chunk
    padded = jnp.pad(tokens, [(0, padding)] + [(0, 0)] * (tokens.ndim - 1))
    return padded.reshape(-1, chunk, *tokens.shape[1:])


def _reduce_head_gradient(plan: _Plan, d_head_DV: jax.Array) -> jax.Array:
    """The head's gradient summed over all tokens, and this device's rows of it where the rows are split."""
    whole = tuple(axis for axis in plan.batch_axes + plan.sequence_axes if axis not in plan.hidden_axes)
    if whole or plan.hidden_axes:
        d_head_DV = d_head_DV.astype(plan.gradient_dtype)
    for axis in plan.hidden_axes:
        scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, scatter_dimension=0, tiled=True)
        columns = range(0, d_head_DV.shape[1], SCATTER_COLUMNS)
        d_head_DV = jnp.concatenate([scatter(d_head_DV[:, start : start + SCATTER_COLUMNS]) for start in columns], axis=1)
    return jax.lax.psum(d_head_DV, whole) if whole else d_head_DV
