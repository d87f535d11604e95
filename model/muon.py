"""Muon (Jordan 2024): averages of gradients, made orthogonal matrix by matrix.

A chip has some rows of every matrix, and an iteration of Newton-Schulz needs all of them. So matrices are dealt out first: each
chip gets whole ones, of all layers and all weights of one shape together, makes them orthogonal by itself, and sends their rows
back, as Jordan's own training deals out parameters. Left to the compiler, every chip multiplies the same R x R squares of all
matrices, and sums them over all chips in every iteration.

Legend: M matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model.optimizer_config import MuonConfig

TRANSPOSED = frozenset({"w_gate", "w_up"})  # stored [L, out, in], the other matrices of the layers [L, in, out]


def scale_by_muon(muon: MuonConfig, shardings: Any = None) -> optax.GradientTransformation:
    """The average of gradients, orthogonal in every layer by itself, times a factor for its shape.

    shardings: a `NamedSharding` for every weight, in a tree like the weights; None: one device has all.
    """
    average = optax.contrib.scale_by_muon(  # without iterations, so of each matrix only its length is made 1
        ns_steps=0, beta=muon.momentum, nesterov=muon.nesterov, weight_dimension_numbers=_dimensions
    )

    def updates(averages: Any, _: Any) -> Any:
        return _scale_by_shape(_orthogonal(averages, muon.ns_steps, shardings), muon.consistent_rms)

    return optax.chain(average, optax.stateless(updates))


def _orthogonal(averages: Any, ns_steps: int, shardings: Any) -> Any:
    """A tree like `averages`, whose leaves are [layers, R, C]: weights of one shape and layout are stacked and dealt out together."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(averages)
    groups: dict[tuple[tuple[int, ...], NamedSharding | None], list[int]] = {}
    for place, (path, x) in enumerate(leaves):
        sharding = None if shardings is None else shardings["layers"][path[-1].key]
        groups.setdefault((x.shape, sharding), []).append(place)
    made: dict[int, jax.Array] = {}
    for (shape, sharding), places in groups.items():
        stack_MRC = jnp.concatenate([leaves[place][1] for place in places])
        stack_MRC = _newton_schulz(stack_MRC, ns_steps) if sharding is None else _dealt_out(stack_MRC, ns_steps, sharding)
        made |= {place: stack_MRC[index * shape[0] : (index + 1) * shape[0]] for index, place in enumerate(places)}
    return jax.tree.unflatten(structure, [made[place] for place in range(len(leaves))])


def _dealt_out(x_MRC: jax.Array, ns_steps: int, sharding: NamedSharding) -> jax.Array:
    """`_newton_schulz` on whole matrices, as many on each chip of a replica as on the next, zeros filling up."""
    mesh, layouts = sharding.mesh, _layouts(sharding)
    padding = -x_MRC.shape[0] % math.prod(size for name, size in mesh.shape.items() if name != "data")
    whole_MRC = jnp.pad(x_MRC, ((0, padding), (0, 0), (0, 0)))
    for layout in layouts:
        whole_MRC = jax.lax.with_sharding_constraint(whole_MRC, NamedSharding(mesh, layout))
    whole_MRC = _newton_schulz(whole_MRC, ns_steps)
    for layout in reversed(layouts):
        whole_MRC = jax.lax.with_sharding_constraint(whole_MRC, NamedSharding(mesh, layout))
    return whole_MRC[: x_MRC.shape[0]]


def _layouts(sharding: NamedSharding) -> list[P]:
    """From the weight's own layout to whole matrices, one dimension at a time: each is one exchange.

    Of two dimensions at once the compiler makes a copy of everything on every chip.
    """
    mesh, split = sharding.mesh, [_names(part) for part in (*sharding.spec, None, None)[1:3]]
    unused = [name for name, size in mesh.shape.items() if size > 1 and name != "data" and name not in split[0] + split[1]]
    rows, columns = split
    return [
        P(None, rows or None, columns or None),
        P(rows or None, None, columns or None),
        P(rows + columns or None),
        P((*rows, *columns, *unused) or None),
    ]


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _newton_schulz(x_MRC: jax.Array, ns_steps: int) -> jax.Array:
    """Jordan's quintic iteration, which optax has inside its Muon: without momentum it is all that is left."""
    iteration = optax.contrib.scale_by_muon(ns_steps=ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=_dimensions)
    update = iteration.update(x_MRC, iteration.init(x_MRC))[0]
    assert isinstance(update, jax.Array)
    return update


def _dimensions(tree: Any) -> Any:
    """The last two of [M, R, C] are a matrix; M is not, so matrices are apart. Which of the two is the input is the same."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), tree)


def _scale_by_shape(updates: Any, consistent_rms: float | None) -> Any:
    """Times `consistent_rms` * sqrt(the longer side) (Liu et al. 2025), or sqrt(max(1, out / in)) (Jordan 2024)."""

    def scale(path: Any, x: jax.Array) -> jax.Array:
        inputs, outputs = x.shape[:0:-1] if path[-1].key in TRANSPOSED else x.shape[1:]
        factor = math.sqrt(max(1.0, outputs / inputs)) if consistent_rms is None else consistent_rms * math.sqrt(max(inputs, outputs))
        return factor * x

    return jax.tree_util.tree_map_with_path(scale, updates)
