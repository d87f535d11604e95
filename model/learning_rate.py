"""The learning rate by optimizer step."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from model.cycles import Cycle, cycles_of
from model.train_config import SimpleTrainConfig

INV_SQRT_TIMESCALE = 10_000  # steps up to which inverse square root stays at the peak


def learning_rate_schedule(train: SimpleTrainConfig) -> optax.Schedule:
    """Learning rate by optimizer step, in cycles (Levanter's rules).

    A cycle rises linearly from where the one before it ended, from exactly 0 at first, to `learning_rate`, stays there, and
    decays. With t steps into T of decay, r = `min_lr_ratio` and the peak p:

        cosine    p * ((1 - r) * (1 + cos(pi * t / T)) / 2 + r)     (Loshchilov and Hutter 2016)
        linear    p * (1 - (1 - r) * t / T)
        inv       p / (1 + (1/r - 1) * t / T)
        inv_sqrt  p * max(r, min(1, sqrt(10,000 / (t + warmup))))   (Vaswani et al. 2017)
    """
    peak, before = train.learning_rate, 0.0
    schedules: list[optax.Schedule] = []
    ends: list[int] = []
    for cycle in cycles_of(train):
        parts = [
            (cycle.warmup, optax.linear_schedule(before, peak, cycle.warmup)),
            (cycle.flat, optax.constant_schedule(peak)),
            (cycle.decay, _decay(train, cycle)),
        ]
        for steps, schedule in parts:
            if steps:
                schedules.append(schedule)
                ends.append((ends[-1] if ends else 0) + steps)
        before = peak * _end_ratio(train, cycle)
    return optax.join_schedules(schedules, ends[:-1]) if len(schedules) > 1 else schedules[0]


def _decay(train: SimpleTrainConfig, cycle: Cycle) -> optax.Schedule:
    """Learning rate by steps since the decay began."""
    peak, ratio, steps = train.learning_rate, train.min_lr_ratio, max(cycle.decay, 1)
    match train.lr_schedule:
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps, alpha=ratio)
        case "linear":
            return optax.linear_schedule(peak, peak * ratio, steps)
        case "constant":
            return optax.constant_schedule(peak)
        case "inv":
            return lambda count: peak / (1.0 + (1.0 / ratio - 1.0) * jnp.minimum(count, steps) / steps)
        case "inv_sqrt":

            def inverse_square_root(count: jax.typing.ArrayLike) -> jax.Array:
                since_start = jnp.maximum(count + cycle.warmup, 1)
                return peak * jnp.maximum(ratio, jnp.minimum(1.0, jnp.sqrt(INV_SQRT_TIMESCALE / since_start)))

            return inverse_square_root


def _end_ratio(train: SimpleTrainConfig, cycle: Cycle) -> float:
    """What the decay of a cycle ends at, as a fraction of the peak."""
    if cycle.decay == 0 or train.lr_schedule == "constant":
        return 1.0
    if train.lr_schedule == "inv_sqrt":
        since_start = max(cycle.decay + cycle.warmup, 1)
        return max(train.min_lr_ratio, min(1.0, math.sqrt(INV_SQRT_TIMESCALE / since_start)))
    return train.min_lr_ratio
