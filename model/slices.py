"""The Cloud TPU catalogue: what a slice's name says about its chips, hosts, topology and links.

    slice_named("v4-128").topology == (4, 4, 4)

Names of v4 and v5p count TensorCores, two to a chip; those of v5e and v6e count chips, one TensorCore each. No JAX here.

Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (shapes, hosts, when a slice is a torus), the accelerator types that the
Cloud TPU API lists, MaxText's accelerator_to_spec_map.py and XPK's system_characteristics.py (default topologies).
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Generation = Literal["v4", "v5e", "v5p", "v6e"]

_V4_CORES = (8, 16, 32, 64, *range(128, 6144 + 1, 128))
# Whole cubes up to 96, less the primes whose only shape would be a ring longer than 256 chips.
_V5P_CUBES = tuple(cubes for cubes in range(1, 97) if cubes not in (67, 71, 73, 79, 83, 89))
_V5P_CORES = (8, 16, 32, 64, *(128 * cubes for cubes in _V5P_CUBES))
_SMALL_3D = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
_SHAPES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_COMPILER_PLATFORM = {"v4": "v4", "v5p": "v5", "v5e": "v5e", "v6e": "v6e"}


@dataclass(frozen=True)
class Slice:
    """Chips of one pod joined by ICI, as one accelerator type of Cloud TPU gives them."""

    name: str  # the accelerator type, as the Cloud TPU API spells it
    generation: Generation
    topology: tuple[int, ...]  # chips along each dimension: three on v4 and v5p, two on v5e and v6e
    chips_per_host: int  # chips that one TPU VM sees
    wrap: tuple[bool, ...]  # whether a dimension closes to a ring

    @property
    def num_chips(self) -> int:
        """Chips, each one device to JAX."""
        return math.prod(self.topology)

    @property
    def num_hosts(self) -> int:
        """TPU VMs, each one process of the job."""
        return self.num_chips // self.chips_per_host

    @property
    def tensorcores(self) -> int:
        """TensorCores; the two of a v4 or v5p chip work as one device."""
        return self.num_chips * _cores_per_chip(self.generation)

    @property
    def topology_name(self) -> str:
        """What libtpu calls the topology, for example "v5:4x4x4" for a v5p-128."""
        return f"{_COMPILER_PLATFORM[self.generation]}:{'x'.join(map(str, self.topology))}"

    def topology_arguments(self, num_slices: int = 1) -> dict[str, Any]:
        """Keyword arguments of `jax.experimental.topologies.get_topology_desc` for ahead-of-time compilation.

        `wrap` matters most: libtpu assumes an open mesh without it and turns all-gathers into padded all-reduces.
        """
        return {
            "platform": "tpu",
            "topology_name": self.topology_name,
            "chip_config_name": "megacore" if _cores_per_chip(self.generation) == 2 else "default",
            "chips_per_host_bounds": {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[self.chips_per_host],
            "num_slices": num_slices,
            "wrap": (*self.wrap, False)[:3],
        }


def slice_named(name: str) -> Slice:
    """The slice that Cloud TPU calls `name`; case does not matter, and "v5e-256" is understood as "v5litepod-256".

    Raises:
        ValueError: there is no such slice; the message lists the nearest names.
    """
    wanted = re.sub(r"^v5e-", "v5litepod-", name.strip().lower())
    known = _catalogue()
    if wanted not in known:
        raise ValueError(
            f"unknown TPU slice {name!r}: did you mean {', '.join(_nearest(wanted))}? "
            "Names of v4 and v5p count TensorCores, 2 per chip (v4-128 has 64 chips); those of v5e and v6e count chips"
        )
    return known[wanted]


def _nearest(name: str, count: int = 4) -> list[str]:
    """Names of the same generation closest in size, or else those spelled most alike."""
    family, _, size = name.rpartition("-")
    related = [known for known in _catalogue() if known.rpartition("-")[0] == family]
    if related and size.isdigit():
        return sorted(sorted(related, key=lambda known: abs(int(known.rpartition("-")[2]) - int(size)))[:count], key=_size)
    return difflib.get_close_matches(name, _catalogue(), n=count, cutoff=0.0)


def _size(name: str) -> int:
    return int(name.rpartition("-")[2])


def _cores_per_chip(generation: Generation) -> int:
    return 2 if generation in ("v4", "v5p") else 1


def _default_topology(num_chips: int) -> tuple[int, int, int]:
    """The shape most like a cube; whole 4x4x4 cubes from 64 chips up."""
    if num_chips in _SMALL_3D:
        return _SMALL_3D[num_chips]
    cubes = num_chips // 64
    shapes = (
        (a, b, cubes // (a * b)) for a in range(1, cubes + 1) for b in range(a, cubes + 1) if cubes % (a * b) == 0 and b <= cubes // (a * b)
    )
    a, b, c = min(shapes, key=sum)
    return 4 * a, 4 * b, 4 * c


def _slice_3d(generation: Generation, cores: int) -> Slice:
    topology = _default_topology(cores // 2)
    torus = all(size % 4 == 0 for size in topology)  # optical switches close the rings of whole cubes only
    return Slice(f"{generation}-{cores}", generation, topology, chips_per_host=4, wrap=(torus,) * 3)


def _slice_2d(generation: Generation, prefix: str, num_chips: int) -> Slice:
    topology = _SHAPES_2D[num_chips]
    return Slice(
        f"{prefix}-{num_chips}",
        generation,
        topology,
        chips_per_host=num_chips if num_chips < 16 else 4,
        wrap=tuple(size == 16 for size in topology),  # only a whole side of the pod has wrap-around links
    )


@cache
def _catalogue() -> dict[str, Slice]:
    slices = [
        *(_slice_3d("v4", cores) for cores in _V4_CORES),
        *(_slice_2d("v5e", "v5litepod", chips) for chips in _SHAPES_2D),
        *(_slice_3d("v5p", cores) for cores in _V5P_CORES),
        *(_slice_2d("v6e", "v6e", chips) for chips in _SHAPES_2D),
    ]
    return {known.name: known for known in slices}


SLICES: dict[str, Slice] = _catalogue()
