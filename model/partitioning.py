"""Where arrays live: the device mesh, the rules from logical to mesh axes, and the shardings they give.

The mesh has three axes. `data` replicates the weights, `fsdp` splits weights and batch (ZeRO-3), `tensor` splits heads,
feed-forward width and vocabulary (Megatron). The arithmetic in `model.llama` names logical axes only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.batch_arithmetic import check_tensor_split
from model.config import LlamaConfig
from model.parameters import Params, logical_axes, param_shapes

MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),  # batch rows that every device of an `fsdp` group works on together
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
}


def make_mesh(*, data: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices` (JAX devices; default: all of them) with `MESH_AXES`; the `fsdp` axis takes what data and tensor leave.

    Raises:
        ValueError: data * tensor does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 or tensor < 1 or len(devices) % (data * tensor):
        raise ValueError(
            f"train.data_parallel_size={data} times train.tensor_parallel_size={tensor} does not divide the {len(devices)} devices: "
            f"choose sizes whose product divides {len(devices)}"
        )
    shape = (data, len(devices) // (data * tensor), tensor)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None) -> P:
    """The partition of an array with these logical axes (None: not split).

    Mesh axes of size 1 are left out. Where `shape` is given, a dimension that its mesh axes do not divide is not split.

    Raises:
        ValueError: an axis has no rule.
    """
    parts: list[str | tuple[str, ...] | None] = []
    for dimension, axis in enumerate(axes):
        if axis is not None and axis not in LOGICAL_RULES:
            raise ValueError(f"logical axis {axis!r} has no rule: use one of {', '.join(LOGICAL_RULES)}")
        live = tuple(name for name in LOGICAL_RULES.get(axis or "", ()) if mesh.shape[name] > 1)
        if shape is not None and shape[dimension] % math.prod(mesh.shape[name] for name in live):
            live = ()
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [B, ...] batch: rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, spec(("batch",), mesh))


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """`x`, told to the compiler to be laid out by its logical axes; without a mesh, `x` itself."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, mesh, x.shape)))
