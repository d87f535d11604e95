"""Norms of every parameter, or of every gradient, for the log: a layer's own although layers are stacked.

Shape suffix: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STACKED = "layers"  # the subtree whose leaves have the layers on their leading axis (`model.parameters`)


def per_layer_norms(tree: Any, prefix: str) -> dict[str, jax.Array]:
    """Euclidean norms, float32, in one pass over the leaves; for use inside jit.

    `{prefix}/layers/wq` is an array [L], a norm a layer; leaves outside the stack are scalars, `{prefix}/embed`; and
    `{prefix}/total` is the norm of everything, from the same squares. `named_norms` spreads the arrays out.

    Args:
        tree: nested dicts of float arrays of any dtype; squares are taken and summed in float32.
        prefix: `grad/norm` or `params/norm`.
    """
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        axes = tuple(range(1, leaf.ndim)) if keys[0] == STACKED else None
        squares["/".join(keys)] = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
    total = sum((jnp.sum(square) for square in squares.values()), jnp.zeros((), jnp.float32))
    return {f"{prefix}/total": jnp.sqrt(total), **{f"{prefix}/{name}": jnp.sqrt(square) for name, square in squares.items()}}


def watched_norms(grads: Any, params: Any) -> dict[str, jax.Array]:
    """`grad/norm/...` and `params/norm/...`, as `per_layer_norms` gives them."""
    return per_layer_norms(grads, "grad/norm") | per_layer_norms(params, "params/norm")


def named_norms(norms: Mapping[str, np.ndarray]) -> dict[str, float]:
    """A number a name, of what `jax.device_get` brought: `grad/norm/layers/wq` [L] becomes `grad/norm/layers/wq/0` and so on."""
    named: dict[str, float] = {}
    for name, norm in norms.items():
        if norm.ndim == 0:
            named[name] = float(norm)
        else:
            named |= {f"{name}/{layer}": float(of) for layer, of in enumerate(norm)}
    return named
