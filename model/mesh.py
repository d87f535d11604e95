"""The device mesh: which axes there are, how large each is, and which chips stand along it.

| axis        | splits                                        | traffic                                   |
|-------------|-----------------------------------------------|-------------------------------------------|
| `data`      | batch; weights replicated (slices first)      | gradients, over DCN between slices        |
| `fsdp`      | batch and weights (ZeRO-3), on a torus plane  | weights gathered, gradients scattered     |
| `fsdp_ring` | the same, on the torus dimension that is left | the same                                  |
| `context`   | the sequence, and weights as `fsdp` does      | keys and values gathered too              |
| `tensor`    | heads, feed-forward width, vocabulary         | activations, in every layer               |

`fsdp` and `fsdp_ring` are one way of splitting on two axes, because libtpu makes a true reduce-scatter only of a group
on one or two torus dimensions; on three it sends the whole sum and cuts it afterwards, 8.4 GB instead of 4.3 for a model
of 2 billion parameters on 64 chips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "fsdp_ring", "context", "tensor")


def make_mesh(
    *, data: int = 1, fsdp_ring: int | None = None, context: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of `devices` (JAX devices; default: all of them) with `MESH_AXES`; the fsdp axes take what the others leave.

    With several TPU slices the outer part of `data` is the slices, so that nothing but gradients crosses between them.
    `fsdp_ring` is taken from the shape of the torus unless it is given.

    Raises:
        ValueError: data * context * tensor does not divide the devices, `data` is not a multiple of the slices, or
            `fsdp_ring` does not divide what is left.
    """
    devices = jax.devices() if devices is None else list(devices)
    fixed = data * context * tensor
    if min(data, context, tensor) < 1 or len(devices) % fixed:
        raise ValueError(
            f"train.data_parallel_size={data} times train.context_parallel_size={context} times train.tensor_parallel_size={tensor} "
            f"does not divide the {len(devices)} devices: choose sizes whose product divides {len(devices)}"
        )
    slices = num_slices(devices)
    if data % slices:
        raise ValueError(
            f"train.data_parallel_size={data} is not a multiple of the {slices} slices, over which weights are replicated: use {slices}"
        )
    fsdp = len(devices) // fixed
    ring = _ring_size(devices[: len(devices) // slices], fsdp, alone=fixed == slices) if fsdp_ring is None else fsdp_ring
    if fsdp % ring:
        raise ValueError(f"fsdp_ring={ring} does not divide the {fsdp} devices that weights are split over")
    shape = (data, fsdp // ring, ring, context, tensor)
    return Mesh(_arranged(devices, shape, slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def num_slices(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices belong to; 1 for anything else."""
    return len({getattr(device, "slice_index", 0) or 0 for device in devices})


def platform_of(mesh: Mesh | None) -> str:
    """`tpu`, `cpu` or `gpu`: what the mesh's devices are, which may be others than this machine has."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _ring_size(devices: Sequence[Any], fsdp: int, *, alone: bool) -> int:
    """Length of `fsdp_ring`: the last dimension of a three-dimensional torus that `fsdp` fills alone, else 1."""
    if not alone or getattr(devices[0], "platform", "") != "tpu":
        return 1
    coordinates = np.array([device.coords for device in devices])
    extent = coordinates.max(axis=0) - coordinates.min(axis=0) + 1
    if len(extent) < 3 or min(extent) < 2 or math.prod(extent.tolist()) != fsdp:
        return 1
    return int(extent[-1])


def _arranged(devices: Sequence[Any], shape: tuple[int, ...], slices: int) -> np.ndarray:
    """The devices in the mesh's shape, neighbours in the torus along each axis."""
    if getattr(devices[0], "platform", "") != "tpu":
        return np.array(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    inside = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, *[1] * (len(shape) - 1)), devices=devices, allow_split_physical_axes=True)
