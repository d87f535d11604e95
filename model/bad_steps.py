"""Which steps are not taken: those whose loss or gradient is not finite, or, where asked for, much larger than of late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.optimizer_config import OutlierWindow
from model.outliers import RecentValues, no_values, outlier_threshold, remember
from model.train_config import SimpleTrainConfig


class RecentSteps(NamedTuple):
    """What steps are judged by: the steps that were taken of late, and how many were skipped since the last of them."""

    loss: RecentValues
    grad_norm: RecentValues
    skipped: Any  # int32 scalar


class TooManySkippedSteps(ArithmeticError):
    """So many steps were skipped one after the other that it is no longer a few bad batches."""


def no_steps(window: OutlierWindow) -> RecentSteps:
    """Nothing to judge by yet."""
    return RecentSteps(no_values(window), no_values(window), jnp.zeros((), jnp.int32))


def judge_step(
    recent: RecentSteps | None, loss: jax.Array, grad_norm: jax.Array, window: OutlierWindow
) -> tuple[jax.Array, RecentSteps | None]:
    """Whether to take a step (bool scalar), and what later steps are judged by.

    Without `recent` a step is good if it is finite. With it, neither loss nor gradient norm may be an outlier either. Numbers
    of steps that are not taken are forgotten: they would make the next ones look normal, and one NaN every later one bad.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if recent is None:
        return good, None
    good &= (loss <= outlier_threshold(recent.loss, window)) & (grad_norm <= outlier_threshold(recent.grad_norm, window))
    skipped = jnp.where(good, 0, recent.skipped + 1)
    return good, RecentSteps(remember(recent.loss, loss, where=good), remember(recent.grad_norm, grad_norm, where=good), skipped)


def check_skipped_steps(step: int, metrics: Mapping[str, float], train: SimpleTrainConfig) -> None:
    """Stops a run that skips as many steps in a row as it is judged by: the loss has moved, or the weights are spoilt.

    Raises:
        TooManySkippedSteps: with what to change.
    """
    skipped = metrics.get("optim/skipped_steps_in_a_row", 0)
    if skipped >= train.bad_step_window.length:
        raise TooManySkippedSteps(
            f"step {step}: the last {skipped:.0f} steps were skipped, loss {metrics['train/loss']}, gradient norm "
            f"{metrics['grad/norm/total']}: raise train.bad_step_window.sigma (now {train.bad_step_window.sigma:g}), or lower "
            f"train.learning_rate (now {train.learning_rate:g})"
        )
