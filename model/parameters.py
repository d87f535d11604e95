"""The parameters of a Llama: one table of shapes, logical axes and initial values.

    {"embed": [V, D], "norm": [D], "head": [D, V] (absent when tied),
     "layers": {"attn_norm", "mlp_norm": [L, D], "wq": [L, D, H*K], "wk", "wv": [L, D, G*K], "wo": [L, H*K, D],
                "w_gate", "w_up", "w_down": [L, F, D]}}

and where the configuration asks for it

    {"embed_norm": [D],
     "layers": {"q_norm", "k_norm": [L, K], "attn_out_norm", "mlp_out_norm": [L, D],
                "bq": [L, H*K], "bk", "bv": [L, G*K], "bo": [L, D], "b_gate", "b_up": [L, F], "b_down": [L, D]}}

L layers, D hidden width, H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary with its padding.
Matrices are [in, out], but for gate and up: with F along the rows of all three, what a chip works on while a part of their
gradient travels is small enough to be read again for every part. Layers are stacked on a leading axis, so that one compiled
layer can be scanned over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.config import LlamaConfig

Params = dict[str, Any]


class _Parameter(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sigma: float | None  # standard deviation before truncation; None starts at `constant`
    constant: float = 1.0


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
    """Initial float32 parameters, the same bits for the same key on any mesh. Norms are one, biases zero, and by `config.initializer`

        fan_in         linear weights are normal, truncated at 3 sigma, sigma = 1/sqrt(fan_in), with no scaling by depth; the
                       embedding likewise with sigma = 1/hidden_dim (Levanter)
        normal         linear weights and the embedding are normal, sigma = initializer_range (transformers' Llama)
        scaled_normal  and `wo` and `w_down` have 1/sqrt(2 num_layers) of that (GPT-2, Radford et al. 2019; Megatron-LM)

    Raises:
        ValueError: `config.vocab_size` is unset.
    """
    table, structure = _flatten(config)
    leaves = []
    for parameter, leaf_key in zip(table, jax.random.split(key, len(table)), strict=True):
        if parameter.sigma is None:
            leaves.append(jnp.full(parameter.shape, parameter.constant, jnp.float32))
        elif config.initializer == "fan_in":
            leaves.append(parameter.sigma * jax.random.truncated_normal(leaf_key, -3.0, 3.0, parameter.shape, jnp.float32))
        else:
            leaves.append(parameter.sigma * jax.random.normal(leaf_key, parameter.shape, jnp.float32))
    return jax.tree.unflatten(structure, leaves)


def _table(config: LlamaConfig) -> Params:
    hidden, vocab = config.hidden_dim, config.padded_vocab_size
    sigma = _sigma(config)
    table: Params = {
        # 1/hidden_dim is the 1/sqrt(fan_in) of a fan-in of hidden_dim^2
        "embed": _Parameter((vocab, hidden), ("vocab", "embed"), sigma(hidden**2)),
        "layers": {**_matrices(config), **_biases(config), **_layer_norms(config)},
    }
    if config.use_layer_norm_weight:
        table["norm"] = _Parameter((hidden,), ("norm",), None)
        if config.input_embedding_norm:
            table["embed_norm"] = _Parameter((hidden,), ("norm",), None)
    if not config.tie_word_embeddings:
        table["head"] = _Parameter((hidden, vocab), ("embed", "vocab"), sigma(hidden))
    return table


def _sigma(config: LlamaConfig) -> Callable[..., float]:
    """The standard deviation of a matrix by its fan-in, and by whether it writes to the residual stream."""

    def sigma(fan_in: int, *, residual: bool = False) -> float:
        if config.initializer == "fan_in":
            return 1.0 / math.sqrt(fan_in)
        scaled = residual and config.initializer == "scaled_normal"
        return config.initializer_range / (math.sqrt(2 * config.num_layers) if scaled else 1.0)

    return sigma


def _matrices(config: LlamaConfig) -> Params:
    hidden, intermediate = config.hidden_dim, config.intermediate_dim
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    sigma = _sigma(config)

    def linear(rows: int, columns: int, *axes: str, fan_in: int, residual: bool = False) -> _Parameter:
        return _Parameter((config.num_layers, rows, columns), ("layers", *axes), sigma(fan_in, residual=residual))

    return {
        "wq": linear(hidden, queries, "embed", "heads", fan_in=hidden),
        "wk": linear(hidden, keys, "embed", "kv", fan_in=hidden),
        "wv": linear(hidden, keys, "embed", "kv", fan_in=hidden),
        "wo": linear(queries, hidden, "heads_fsdp", "norm", fan_in=queries, residual=True),
        "w_gate": linear(intermediate, hidden, "mlp_fsdp", "norm", fan_in=hidden),
        "w_up": linear(intermediate, hidden, "mlp_fsdp", "norm", fan_in=hidden),
        "w_down": linear(intermediate, hidden, "mlp_fsdp", "norm", fan_in=intermediate, residual=True),
    }


def _biases(config: LlamaConfig) -> Params:
    """Each is split as the columns of its product are."""
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    sizes: dict[str, tuple[int, str]] = {}
    if config.attention_bias:
        sizes |= {"bq": (queries, "heads"), "bk": (keys, "kv"), "bv": (keys, "kv")}
    if config.attention_bias is True:
        sizes["bo"] = (config.hidden_dim, "norm")
    if config.mlp_bias:
        sizes |= dict.fromkeys(("b_gate", "b_up"), (config.intermediate_dim, "mlp"))
        sizes["b_down"] = (config.hidden_dim, "norm")
    return {name: _Parameter((config.num_layers, size), ("layers", axis), None, 0.0) for name, (size, axis) in sizes.items()}


def _layer_norms(config: LlamaConfig) -> Params:
    if not config.use_layer_norm_weight:
        return {}
    sizes = dict.fromkeys(("attn_norm", "mlp_norm"), config.hidden_dim)
    if config.hybrid_norm:
        sizes |= dict.fromkeys(("attn_out_norm", "mlp_out_norm"), config.hidden_dim)
    if config.qk_norm:
        sizes |= dict.fromkeys(("q_norm", "k_norm"), config.head_size)
    return {name: _Parameter((config.num_layers, size), ("layers", "norm"), None) for name, size in sizes.items()}


def _flatten(config: LlamaConfig) -> tuple[list[_Parameter], Any]:
    return jax.tree.flatten(_table(config), is_leaf=lambda node: isinstance(node, _Parameter))


def _map_table(config: LlamaConfig, function: Any) -> Params:
    return jax.tree.map(function, _table(config), is_leaf=lambda node: isinstance(node, _Parameter))
