"""Where arrays live: the rules from logical to mesh axes, and the shardings they give.

The arithmetic in `model.llama` names logical axes only; the mesh is in `model.mesh`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.batch_arithmetic import check_tensor_split
from model.config import LlamaConfig
from model.mesh import MESH_AXES, make_mesh
from model.parameters import Params, logical_axes, param_shapes

__all__ = [
    "LOGICAL_RULES",
    "MESH_AXES",
    "batch_sharding",
    "constrain",
    "gathered",
    "live_axes",
    "make_mesh",
    "param_shardings",
    "spec",
]

# What weights are split over, to be gathered for use: all axes that tokens are split over, inside a replica.
WEIGHT_AXES = ("fsdp", "fsdp_ring", "context")

# Weights are split along their rows, whichever dimension of the model those are: the compiler scatters gradients
# along rows only, of columns it sends everything everywhere.
LOGICAL_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "fsdp_ring"),
    "replica": ("data",),  # batch rows that all devices which split one copy of the weights work on together
    "sequence": ("context",),
    "embed": WEIGHT_AXES,
    "embed_of_token": ("fsdp", "fsdp_ring"),  # of activations whose tokens are over `context` already
    "heads": ("tensor",),
    "heads_fsdp": ("tensor", *WEIGHT_AXES),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "mlp_fsdp": ("tensor", *WEIGHT_AXES),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
}


def live_axes(axis: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes, larger than 1, that a logical axis is split over.

    Raises:
        ValueError: the axis has no rule.
    """
    if axis not in LOGICAL_RULES:
        raise ValueError(f"logical axis {axis!r} has no rule: use one of {', '.join(LOGICAL_RULES)}")
    return tuple(name for name in LOGICAL_RULES[axis] if mesh.shape[name] > 1)


def spec(axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None) -> P:
    """The partition of an array with these logical axes (None: not split).

    Mesh axes of size 1 are left out. Where `shape` is given, a dimension is split over the first of its axes that divide it.

    Raises:
        ValueError: an axis has no rule.
    """
    parts: list[str | tuple[str, ...] | None] = []
    for dimension, axis in enumerate(axes):
        live = () if axis is None else live_axes(axis, mesh)
        while shape is not None and shape[dimension] % math.prod(mesh.shape[name] for name in live):
            live = live[:-1]
        parts.append(live[0] if len(live) == 1 else live or None)
    return P(*parts)


def param_shardings(config: LlamaConfig, mesh: Mesh) -> Params:
    """The parameter tree with a `NamedSharding` at every leaf.

    A width that `fsdp` does not divide stays whole on every device of that axis; that costs memory, never correctness.
    `tensor` must divide its dimensions, because the layers compute on the split parts.

    Raises:
        ValueError: the `tensor` axis does not divide heads, key/value heads, feed-forward width or vocabulary.
    """
    check_tensor_split(config, mesh.shape["tensor"])
    shapes, axes = param_shapes(config), logical_axes(config)
    return jax.tree.map(lambda array, names: NamedSharding(mesh, spec(names, mesh, array.shape)), shapes, axes)


def gathered(partition: P, *, keep: Sequence[str] = ()) -> P:
    """The partition without the axes that weights are gathered over, but for those in `keep`."""
    dropped = set(WEIGHT_AXES) - set(keep)

    def kept(part: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = tuple(name for name in ((part,) if isinstance(part, str) else part or ()) if name not in dropped)
        return names[0] if len(names) == 1 else names or None

    return P(*map(kept, partition))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [B, S] batch: rows over the data and fsdp axes, tokens over `context`."""
    return NamedSharding(mesh, spec(("batch", "sequence"), mesh))


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """`x`, told to the compiler to be laid out by its logical axes; without a mesh, `x` itself."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, mesh, x.shape)))
