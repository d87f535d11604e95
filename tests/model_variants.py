"""Models that differ from a plain Llama, each in some of the fields that change the maths."""

from __future__ import annotations

from typing import Any

import jax

from model.config import LlamaConfig, RopeConfig
from model.parameters import init_params

BASE = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=64)
VARIANTS: dict[str, dict[str, Any]] = {
    "qk_norm, own head width, tied": {"qk_norm": True, "head_dim": 12, "tie_word_embeddings": True},
    "window": {"sliding_window": 6},
    "all biases, relu": {"attention_bias": True, "mlp_bias": True, "activation_function": "relu"},
    "qkv biases, window": {"attention_bias": "qkv", "sliding_window": 3},
    "all norms": {"hybrid_norm": True, "input_embedding_norm": True, "qk_norm": True},
    "norms without weight": {"hybrid_norm": True, "input_embedding_norm": True, "qk_norm": True, "use_layer_norm_weight": False},
    "yarn": {"rope": RopeConfig(type="yarn", factor=4.0, original_max_position_embeddings=16)},
}


def variant(name: str) -> LlamaConfig:
    """The configuration, validated."""
    return LlamaConfig(**{**dict(BASE), **VARIANTS[name]})


def random_params(config: LlamaConfig, seed: int = 0) -> Any:
    """Weights of which none is one or zero, large enough that choices are clear."""
    params = init_params(config, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [3 * x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)
