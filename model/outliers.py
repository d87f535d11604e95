"""Numbers that are much larger than the latest ones of their kind. N numbers are remembered."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.optimizer_config import OutlierWindow


class RecentValues(NamedTuple):
    """The latest numbers of one kind, in a ring."""

    values_N: Any  # float32
    count: Any  # int32 scalar: numbers that ever came in


def no_values(window: OutlierWindow) -> RecentValues:
    """An empty ring."""
    return RecentValues(jnp.zeros(window.length, jnp.float32), jnp.zeros((), jnp.int32))


def outlier_threshold(recent: RecentValues, window: OutlierWindow) -> jax.Array:
    """Float32: mean + sigma * (population) standard deviation of what is remembered; infinite below `min_entries` numbers."""
    length = recent.values_N.shape[0]
    present_N = jnp.arange(length) < recent.count
    mean = jnp.mean(recent.values_N, where=present_N)
    deviation = jnp.std(recent.values_N, where=present_N)
    return jnp.where(recent.count >= window.min_entries, mean + window.sigma * deviation, jnp.inf)


def remember(recent: RecentValues, value: jax.Array, *, where: jax.Array) -> RecentValues:
    """The ring with `value` in place of its oldest number, or as it was where `where` is false."""
    place = recent.count % recent.values_N.shape[0]
    values_N = recent.values_N.at[place].set(jnp.where(where, value, recent.values_N[place]))
    return RecentValues(values_N, recent.count + where.astype(jnp.int32))


class ClipUpdateNormState(NamedTuple):
    """The latest lengths of updates, after clipping; the last length before it, and what it was multiplied by."""

    recent: RecentValues
    norm: Any  # float32 scalar
    scale: Any  # float32 scalar, 1 where nothing was clipped


def clip_outlying_norm(window: OutlierWindow) -> optax.GradientTransformation:
    """Shortens an update longer than `outlier_threshold` of the latest updates to that threshold (Levanter's `clip_update_norm`).

    What is remembered is the length after clipping, so that one long update does not make room for the next.
    """

    def init(params: Any) -> ClipUpdateNormState:
        return ClipUpdateNormState(no_values(window), jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ClipUpdateNormState]:
        norm, threshold = optax.global_norm(updates), outlier_threshold(state.recent, window)
        scale = jnp.where(norm > threshold, threshold / norm, 1.0)
        recent = remember(state.recent, norm * scale, where=jnp.isfinite(norm))
        return optax.tree.scale(scale, updates), ClipUpdateNormState(recent, norm, scale)

    return optax.GradientTransformation(init, update)


def clip_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """`optim/clip_update/...` of the last update of a named chain; nothing where updates are not clipped so."""
    states = [part for part in opt_state.values() if isinstance(part, ClipUpdateNormState)]
    return {f"optim/clip_update/{name}": getattr(state, name) for state in states for name in ("norm", "scale")}
