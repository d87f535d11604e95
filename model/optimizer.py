"""AdamW with the decay mask and the learning-rate schedules of Llama pretraining."""

from __future__ import annotations

from typing import Any

import jax
import optax

from model.train_config import SimpleTrainConfig

# Weights of Linear layers, by name in the parameter tree. Norms and the embedding are not decayed;
# a tied embedding is an embedding (Levanter's default mask, marin's `weight_decay_modules`).
DECAYED = frozenset({"head", "wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"})


def decay_mask(params: Any) -> Any:
    """A tree like `params` of bools: True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def decayed_names(params: Any) -> list[str]:
    """Names such as `layers/wq` of the parameters that are decayed, for the start-up report."""
    leaves = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    return ["/".join(str(key.key) for key in path) for path, decayed in leaves if decayed]


def learning_rate_schedule(train: SimpleTrainConfig) -> optax.Schedule:
    """Learning rate by optimizer step: linear warmup from exactly 0, then `lr_schedule` to the last step.

    Cosine: lr * ((1 - r) * (1 + cos(pi * t / T)) / 2 + r) with r = `min_lr_ratio` and T = steps after warmup.
    """
    peak, warmup = train.learning_rate, train.warmup_steps
    remaining = max(train.num_train_steps - warmup, 1)
    match train.lr_schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, remaining, alpha=train.min_lr_ratio)
        case "linear":
            after = optax.linear_schedule(peak, peak * train.min_lr_ratio, remaining)
        case "constant":
            after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(train: SimpleTrainConfig) -> optax.GradientTransformation:
    """Global-norm clip, Adam (Kingma and Ba 2014), decoupled decay (Loshchilov and Hutter 2017), times -lr, in this order."""
    steps = [] if train.max_grad_norm is None else [optax.clip_by_global_norm(train.max_grad_norm)]
    return optax.chain(
        *steps,
        optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.epsilon),
        optax.add_decayed_weights(train.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(train)),
    )
