"""A Llama and its training loss written straight down from their definitions, for comparison: float32, one device, whole scores and logits.

Shape suffixes: B batch, S and T sequence, D hidden width, H query heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.config import LlamaConfig


def loss_terms(params: Any, batch: Mapping[str, Any], config: LlamaConfig, z_loss_weight: float) -> dict[str, jax.Array]:
    """Means over the tokens that count: `loss` and the two terms it is the sum of; and how many tokens count, `weight`."""
    logits_BSV = plain_logits(params, batch, config)
    lse_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    picked_BS = jnp.take_along_axis(logits_BSV, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    weights_BS = jnp.asarray(batch["loss_weights"])
    weight = weights_BS.sum()
    cross_entropy = (weights_BS * (lse_BS - picked_BS)).sum() / weight
    z_loss = z_loss_weight * (weights_BS * lse_BS**2).sum() / weight
    return {"loss": cross_entropy + z_loss, "cross_entropy": cross_entropy, "z_loss": z_loss, "weight": weight}


def plain_logits(params: Any, batch: Mapping[str, Any], config: LlamaConfig) -> jax.Array:
    """Logits [B, S, V] of the vocabulary without its padding; of rotary embeddings the plain one, of activations silu and relu."""
    segments_BS = jnp.asarray(batch["segment_ids"])
    count = segments_BS.shape[1]
    distance_ST = jnp.arange(count)[:, None] - jnp.arange(count)
    seen_BST = (segments_BS[:, :, None] == segments_BS[:, None]) & (distance_ST >= 0) & (distance_ST < (config.sliding_window or count))
    x_BSD = params["embed"][batch["tokens"]]
    if config.input_embedding_norm:
        x_BSD = _norm(x_BSD, params, "embed_norm", config)
    for index in range(config.num_layers):
        w = {name: stacked[index] for name, stacked in params["layers"].items()}
        update_BSD = _attention(_norm(x_BSD, w, "attn_norm", config), w, seen_BST, batch["positions"], config)
        x_BSD = x_BSD + (_norm(update_BSD, w, "attn_out_norm", config) if config.hybrid_norm else update_BSD)
        update_BSD = _feed_forward(_norm(x_BSD, w, "mlp_norm", config), w, config)
        x_BSD = x_BSD + (_norm(update_BSD, w, "mlp_out_norm", config) if config.hybrid_norm else update_BSD)
    head_DV = (params["embed"].T if config.tie_word_embeddings else params["head"])[:, : config.vocab_size]
    logits_BSV = _norm(x_BSD, params, "norm", config) @ head_DV
    cap = config.logit_soft_cap
    return logits_BSV if cap is None else cap * jnp.tanh(logits_BSV / cap)


def _norm(x: jax.Array, weights: Any, name: str, config: LlamaConfig) -> jax.Array:
    divided = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
    return divided * weights[name] if config.use_layer_norm_weight else divided


def _attention(h_BSD: jax.Array, w: Any, seen_BST: jax.Array, positions_BS: Any, config: LlamaConfig) -> jax.Array:
    def heads(name: str) -> jax.Array:
        x_BSHK = (h_BSD @ w[f"w{name}"] + w.get(f"b{name}", 0.0)).reshape(*h_BSD.shape[:2], -1, config.head_size)
        if config.qk_norm and name != "v":
            x_BSHK = _norm(x_BSHK, w, f"{name}_norm", config)
        x_BSHK = x_BSHK if name == "v" else _turned(x_BSHK, positions_BS, config.rope.theta)
        return jnp.repeat(x_BSHK, config.num_heads // x_BSHK.shape[2], axis=2)

    scores_BHST = jnp.einsum("bshk,bthk->bhst", heads("q"), heads("k")) / jnp.sqrt(config.head_size)
    probabilities_BHST = jax.nn.softmax(jnp.where(seen_BST[:, None], scores_BHST, -jnp.inf), axis=-1)
    output_BSHK = jnp.einsum("bhst,bthk->bshk", probabilities_BHST, heads("v"))
    return output_BSHK.reshape(*h_BSD.shape[:2], -1) @ w["wo"] + w.get("bo", 0.0)


def _feed_forward(h_BSD: jax.Array, w: Any, config: LlamaConfig) -> jax.Array:
    gate, up = (h_BSD @ w[f"w_{name}"].T + w.get(f"b_{name}", 0.0) for name in ("gate", "up"))
    activated = {"silu": gate / (1 + jnp.exp(-gate)), "relu": jnp.maximum(gate, 0.0)}[config.activation_function]
    return (activated * up) @ w["w_down"] + w.get("b_down", 0.0)


def _turned(x_BSHK: jax.Array, positions_BS: Any, theta: float) -> jax.Array:
    """Rotary embedding: numbers i and i + K/2 of a head are a complex number, turned by position * theta^(-2i/K)."""
    half = x_BSHK.shape[-1] // 2
    angles = jnp.asarray(positions_BS)[:, :, None, None] * theta ** (-jnp.arange(half) / half)
    turned = (x_BSHK[..., :half] + 1j * x_BSHK[..., half:]) * jnp.exp(1j * angles)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)
