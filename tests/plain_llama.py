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
    logits_BSV = _logits(params, batch, config)
    lse_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    picked_BS = jnp.take_along_axis(logits_BSV, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    weights_BS = jnp.asarray(batch["loss_weights"])
    weight = weights_BS.sum()
    cross_entropy = (weights_BS * (lse_BS - picked_BS)).sum() / weight
    z_loss = z_loss_weight * (weights_BS * lse_BS**2).sum() / weight
    return {"loss": cross_entropy + z_loss, "cross_entropy": cross_entropy, "z_loss": z_loss, "weight": weight}


def _logits(params: Any, batch: Mapping[str, Any], config: LlamaConfig) -> jax.Array:
    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_epsilon) * weight

    def heads(x_BSD: jax.Array, weight: jax.Array, *, turned: bool) -> jax.Array:
        x_BSHK = (x_BSD @ weight).reshape(*x_BSD.shape[:2], -1, config.head_size)
        x_BSHK = _turned(x_BSHK, batch["positions"], config.rope.theta) if turned else x_BSHK
        return jnp.repeat(x_BSHK, config.num_heads // x_BSHK.shape[2], axis=2)

    segments_BS = jnp.asarray(batch["segment_ids"])
    seen_BST = (segments_BS[:, :, None] == segments_BS[:, None]) & jnp.tri(segments_BS.shape[1], dtype=bool)
    x_BSD = params["embed"][batch["tokens"]]
    for index in range(config.num_layers):
        w = {name: stacked[index] for name, stacked in params["layers"].items()}
        h = norm(x_BSD, w["attn_norm"])
        q, k, v = heads(h, w["wq"], turned=True), heads(h, w["wk"], turned=True), heads(h, w["wv"], turned=False)
        scores_BHST = jnp.einsum("bshk,bthk->bhst", q, k) / jnp.sqrt(config.head_size)
        probabilities_BHST = jax.nn.softmax(jnp.where(seen_BST[:, None], scores_BHST, -jnp.inf), axis=-1)
        x_BSD = x_BSD + jnp.einsum("bhst,bthk->bshk", probabilities_BHST, v).reshape(*h.shape[:2], -1) @ w["wo"]
        h = norm(x_BSD, w["mlp_norm"])
        x_BSD = x_BSD + (jax.nn.silu(h @ w["w_gate"].T) * (h @ w["w_up"].T)) @ w["w_down"]
    head_DV = (params["embed"].T if config.tie_word_embeddings else params["head"])[:, : config.vocab_size]
    logits_BSV = norm(x_BSD, params["norm"]) @ head_DV
    cap = config.logit_soft_cap
    return logits_BSV if cap is None else cap * jnp.tanh(logits_BSV / cap)


def _turned(x_BSHK: jax.Array, positions_BS: Any, theta: float) -> jax.Array:
    """Rotary embedding: numbers i and i + K/2 of a head are a complex number, turned by position * theta^(-2i/K)."""
    half = x_BSHK.shape[-1] // 2
    angles = jnp.asarray(positions_BS)[:, :, None, None] * theta ** (-jnp.arange(half) / half)
    turned = (x_BSHK[..., :half] + 1j * x_BSHK[..., half:]) * jnp.exp(1j * angles)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)
