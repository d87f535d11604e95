"""The Llama decoder (Touvron et al. 2023) as pure functions over a parameter tree: arithmetic only.

    params = init_params(config, jax.random.key(0))
    logits = forward(params, tokens, config)

Pre-norm RMSNorm, rotary positions, grouped-query attention, a gated feed-forward layer. Where arrays live is said in logical axis names and
decided by `model.partitioning`; what the parameters are, in `model.parameters`.

Shape suffixes: B batch, S sequence, D hidden width, H query heads, G key/value heads, K head width, F feed-forward width,
V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from model.attention import attention
from model.config import Activation, LlamaConfig
from model.context_parallel import context_size
from model.linear import FLOAT32, Precision, linear
from model.parameters import Params, init_params, logical_axes, param_shapes
from model.partitioning import constrain
from model.remat import rematerialised
from model.rope import apply_rope, rope_tables

__all__ = [
    "Params",
    "decoder_layer",
    "embed_tokens",
    "final_norm",
    "forward",
    "hidden_states",
    "init_params",
    "logical_axes",
    "output_head",
    "param_shapes",
    "rms_norm",
    "unembed",
]

# From q [B, H, S, K] and k, v [B, G, S, K], after rotation, to the output [B, H, S, K] and any state to hand on.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

# By transformers' names, where `gelu_new` is the approximation by tanh (Hendrycks & Gimpel 2016) and `quick_gelu` that by a sigmoid.
_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def forward(
    params: Params,
    tokens: jax.Array,
    config: LlamaConfig,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    compute_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Next-token logits, float32 [B, S, V], of int `tokens` [B, S]; the other arguments as in `hidden_states`."""
    precision = Precision(compute_dtype)
    x_BSD = hidden_states(params, tokens, config, segment_ids=segment_ids, positions=positions, precision=precision)
    return unembed(params, x_BSD, config)


def hidden_states(
    params: Params,
    tokens: jax.Array,
    config: LlamaConfig,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    precision: Precision = FLOAT32,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The residual stream after the last layer and the final norm, [B, S, D] in `precision.compute`.

    Args:
        params: the tree of `model.parameters`, float32.
        tokens: int [B, S], each in [0, vocab_size).
        segment_ids: int [B, S]; a token attends to earlier tokens of its own id only. None: one segment a row.
        positions: int [B, S] for the rotary embedding, restarting in each document. None: 0, 1, ... along the row, which
            attention cannot tell apart because rotary scores depend on distances alone.
        precision: dtypes of the layers; norms, rotation and softmax are float32 whatever they are.
        mesh: lay activations out over it by the logical rules; None leaves that to the compiler. Where its `context` axis is
            larger than 1, all arrays have their tokens in the order of `model.context_parallel` and `positions` is required.
    """
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    rope = rope_tables(positions, config)

    def attend(q_BHSK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array) -> tuple[jax.Array, None]:
        return attention(q_BHSK, k_BGSK, v_BGSK, segment_ids, config, mesh), None

    def layer_step(x_BSD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return decoder_layer(x_BSD, layer, rope, attend, config, precision, mesh)

    layer_step = rematerialised(layer_step, config.remat, scanned=config.scan_layers)
    x_BSD = embed_tokens(params, tokens, config, precision.compute, mesh)
    if config.scan_layers:
        x_BSD, _ = jax.lax.scan(layer_step, x_BSD, params["layers"])
    else:
        for index in range(config.num_layers):
            x_BSD, _ = layer_step(x_BSD, jax.tree.map(lambda stacked, index=index: stacked[index], params["layers"]))
    return final_norm(params, x_BSD, config)


def embed_tokens(params: Params, tokens_BS: jax.Array, config: LlamaConfig, dtype: DTypeLike, mesh: Mesh | None = None) -> jax.Array:
    """Embedding rows [B, S, D] in `dtype`, normalised where `input_embedding_norm` asks for it.

    The lookup is in float32, so that the gradient of a frequent token is summed in float32 too. On a mesh each device
    first looks up its own columns for every token of its replica, which keeps table and gradient split.
    """
    tokens_BS = constrain(jnp.asarray(tokens_BS), ("replica", None), mesh)
    x_BSD = constrain(jnp.asarray(params["embed"])[tokens_BS], ("replica", None, "embed"), mesh)
    x_BSD = x_BSD.astype(dtype)
    if context_size(mesh) > 1:
        # From columns over all of a replica's devices to rows and tokens at once the compiler goes by way of the whole batch on each.
        x_BSD = constrain(x_BSD, ("replica", "sequence", "embed_of_token"), mesh)
    x_BSD = constrain(x_BSD, ("batch", "sequence", None), mesh)
    return rms_norm(x_BSD, params.get("embed_norm"), config.layer_norm_epsilon) if config.input_embedding_norm else x_BSD


def final_norm(params: Params, x_BSD: jax.Array, config: LlamaConfig) -> jax.Array:
    """The norm between the last layer and the head."""
    return rms_norm(x_BSD, params.get("norm"), config.layer_norm_epsilon)


def output_head(params: Params) -> jax.Array:
    """The output matrix [D, V], its padded columns too: the head, or the embedding transposed when the two are tied."""
    return params["head"] if "head" in params else params["embed"].T


def unembed(params: Params, x_BSD: jax.Array, config: LlamaConfig) -> jax.Array:
    """Float32 logits [B, S, V] of the vocabulary without its padding; the product itself runs in the dtype of `x_BSD`."""
    head_DV = output_head(params)[:, : config.vocab_size].astype(x_BSD.dtype)
    logits_BSV = jnp.einsum("bsd,dv->bsv", x_BSD, head_DV, preferred_element_type=jnp.float32)
    cap = config.logit_soft_cap
    return logits_BSV if cap is None else cap * jnp.tanh(logits_BSV / cap)


def rms_norm(x_BSD: jax.Array, weight_D: jax.Array | None, epsilon: float) -> jax.Array:
    """RMSNorm (Zhang & Sennrich 2019) over the last axis, float32 inside, the input's dtype out; without a weight it only divides."""
    x = x_BSD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    normalised = x * scale if weight_D is None else x * scale * weight_D
    return normalised.astype(x_BSD.dtype)


def decoder_layer(
    x_BSD: jax.Array,
    layer: Params,
    rope: tuple[jax.Array, jax.Array],
    attend: Attend,
    config: LlamaConfig,
    precision: Precision,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Any]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); with `hybrid_norm`, x + norm(attention(norm(x))) and so on.

    Args:
        layer: one layer's slice of `params["layers"]`.
        rope: the tables of the tokens' positions.
        attend: the attention to use; training masks by segment, generation reads and grows a cache.
        precision: dtypes of the products.

    Returns:
        The new [B, S, D], and the state that `attend` returned.
    """

    def added(x_BSD: jax.Array, update_BSD: jax.Array, norm: str) -> jax.Array:
        if config.hybrid_norm:
            update_BSD = rms_norm(update_BSD, layer.get(norm), config.layer_norm_epsilon)
        return constrain(x_BSD + update_BSD, ("batch", "sequence", None), mesh)

    h_BSD = rms_norm(x_BSD, layer.get("attn_norm"), config.layer_norm_epsilon)
    update_BSD, state = _attention_block(h_BSD, layer, rope, attend, config, precision, mesh)
    x_BSD = added(x_BSD, update_BSD, "attn_out_norm")
    h_BSD = rms_norm(x_BSD, layer.get("mlp_norm"), config.layer_norm_epsilon)
    return added(x_BSD, _mlp_block(h_BSD, layer, config, precision, mesh), "mlp_out_norm"), state


def _attention_block(
    h_BSD: jax.Array,
    layer: Params,
    rope: tuple[jax.Array, jax.Array],
    attend: Attend,
    config: LlamaConfig,
    precision: Precision,
    mesh: Mesh | None,
) -> tuple[jax.Array, Any]:
    width, size = config.hidden_dim, config.head_size

    def heads(name: str, axis: str) -> jax.Array:
        projected = linear("bsd,dhk->bhsk", h_BSD, layer[f"w{name}"], ("embed", axis), (width, -1, size), precision, mesh)
        projected = _biased(projected, layer.get(f"b{name}"), (-1, 1, size))
        return constrain(checkpoint_name(projected, "qkv"), ("batch", axis, "sequence", None), mesh)

    def turned(x: jax.Array, norm: str) -> jax.Array:
        return apply_rope(rms_norm(x, layer.get(norm), config.layer_norm_epsilon) if config.qk_norm else x, rope)

    q_BHSK, k_BGSK, v_BGSK = heads("q", "heads"), heads("k", "kv"), heads("v", "kv")
    output_BHSK, state = attend(turned(q_BHSK, "q_norm"), turned(k_BGSK, "k_norm"), v_BGSK)
    output_BHSK = checkpoint_name(output_BHSK, "attn_out")
    output_BSD = linear("bhsk,hkd->bsd", output_BHSK, layer["wo"], ("heads_fsdp", None), (-1, size, width), precision, mesh)
    return _biased(output_BSD, layer.get("bo")), state


def _mlp_block(h_BSD: jax.Array, layer: Params, config: LlamaConfig, precision: Precision, mesh: Mesh | None) -> jax.Array:
    intermediate, width = layer["w_gate"].shape

    def widened(name: str) -> jax.Array:
        projected = linear("bsd,fd->bsf", h_BSD, layer[f"w_{name}"], ("mlp_fsdp", None), (intermediate, width), precision, mesh)
        return checkpoint_name(_biased(projected, layer.get(f"b_{name}")), f"mlp_{name}")

    gate_BSF, up_BSF = widened("gate"), widened("up")
    activation_BSF = constrain(_ACTIVATIONS[config.activation_function](gate_BSF) * up_BSF, ("batch", "sequence", "mlp"), mesh)
    output_BSD = linear("bsf,fd->bsd", activation_BSF, layer["w_down"], ("mlp_fsdp", None), (intermediate, width), precision, mesh)
    return _biased(output_BSD, layer.get("b_down"))


def _biased(x: jax.Array, bias: jax.Array | None, shape: tuple[int, ...] = (-1,)) -> jax.Array:
    """`x` plus a float32 bias read as `shape`, in the dtype of `x`; added in float32, so that its gradient is summed in float32 too."""
    return x if bias is None else (x.astype(jnp.float32) + bias.reshape(shape)).astype(x.dtype)
