"""The parameters of a Llama: one table of shapes, logical axes and initial values.

    {"embed": [V, D], "norm": [D], "head": [D, V] (absent when tied),
     "layers": {"attn_norm", "mlp_norm": [L, D], "wq": [L, D, H*K], "wk", "wv": [L, D, G*K], "wo": [L, H*K, D],
                "w_gate", "w_up", "w_down": [L, F, D]}}

L layers, D hidden width, H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary with its padding.
Matrices are [in, out], but for gate and up: with F along the rows of all three, what a chip works on while a part of their
gradient travels is small enough to be read again for every part. Layers are stacked on a leading axis, so that one compiled
layer can be scanned over them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.config import LlamaConfig

Params = dict[str, Any]


class _Parameter(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sigma: float | None  # standard deviation before truncation; None starts at one


def param_shapes(config: LlamaConfig) -> Params:
    """The parameter tree with a float32 `jax.ShapeDtypeStruct` at every leaf.

    Raises:
        ValueError: `config.vocab_size` is unset.
    """
    return _map_table(config, lambda parameter: jax.ShapeDtypeStruct(parameter.shape, jnp.float32))


def logical_axes(config: LlamaConfig) -> Params:
    """The parameter tree with a tuple of logical axis names at every leaf; `model.partitioning` maps them to a mesh."""
    return _map_table(config, lambda parameter: parameter.axes)


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Initial float32 parameters, the same bits for the same key on any mesh (Levanter's scheme).

    Linear weights are normal, truncated at 3 sigma, sigma = 1/sqrt(fan_in), with no scaling by depth; the embedding
    likewise with sigma = 1/hidden_dim; norms are one.

    Raises:
        ValueError: `config.vocab_size` is unset.
    """
    table, structure = _flatten(config)
    leaves = []
    for parameter, leaf_key in zip(table, jax.random.split(key, len(table)), strict=True):
        if parameter.sigma is None:
            leaves.append(jnp.ones(parameter.shape, jnp.float32))
        else:
            leaves.append(parameter.sigma * jax.random.truncated_normal(leaf_key, -3.0, 3.0, parameter.shape, jnp.float32))
    return jax.tree.unflatten(structure, leaves)


def _table(config: LlamaConfig) -> Params:
    layers, hidden, intermediate, vocab = config.num_layers, config.hidden_dim, config.intermediate_dim, config.padded_vocab_size
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size

    def linear(rows: int, columns: int, *axes: str, fan_in: int) -> _Parameter:
        return _Parameter((layers, rows, columns), ("layers", *axes), 1.0 / math.sqrt(fan_in))

    norm = _Parameter((layers, hidden), ("layers", "norm"), None)
    table: Params = {
        "embed": _Parameter((vocab, hidden), ("vocab", "embed"), 1.0 / hidden),
        "norm": _Parameter((hidden,), ("norm",), None),
        "layers": {
            "attn_norm": norm,
            "mlp_norm": norm,
            "wq": linear(hidden, queries, "embed", "heads", fan_in=hidden),
            "wk": linear(hidden, keys, "embed", "kv", fan_in=hidden),
            "wv": linear(hidden, keys, "embed", "kv", fan_in=hidden),
            "wo": linear(queries, hidden, "heads_fsdp", "norm", fan_in=queries),
            "w_gate": linear(intermediate, hidden, "mlp_fsdp", "norm", fan_in=hidden),
            "w_up": linear(intermediate, hidden, "mlp_fsdp", "norm", fan_in=hidden),
            "w_down": linear(intermediate, hidden, "mlp_fsdp", "norm", fan_in=intermediate),
        },
    }
    if not config.tie_word_embeddings:
        table["head"] = _Parameter((hidden, vocab), ("embed", "vocab"), 1.0 / math.sqrt(hidden))
    return table


def _flatten(config: LlamaConfig) -> tuple[list[_Parameter], Any]:
    return jax.tree.flatten(_table(config), is_leaf=lambda node: isinstance(node, _Parameter))


def _map_table(config: LlamaConfig, function: Any) -> Params:
    return jax.tree.map(function, _table(config), is_leaf=lambda node: isinstance(node, _Parameter))
