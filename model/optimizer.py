"""What a step makes of the gradient: the optimizers, weight decay and the clipping of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.learning_rate import learning_rate_schedule
from model.muon import scale_by_muon
from model.optimizer_config import AdafactorConfig
from model.outliers import clip_outlying_norm
from model.sophia import scale_by_sophia_g
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


def make_optimizer(train: SimpleTrainConfig, shardings: Any = None) -> optax.GradientTransformationExtraArgs:
    """Global-norm clip, the optimizer, decoupled decay (Loshchilov and Hutter 2017), update clipping, times -lr, in this order.

    `update` takes the number of the step as `step`: a step that was skipped counts for the learning rate, not for the moments.
    The state of each part has its name, so that a run which starts from another's checkpoint takes what is the same thing there.

    shardings: where weights live, in a tree like theirs, for `update` under a mesh; the state does not depend on it.
    """
    steps: list[tuple[str, optax.GradientTransformation]] = []
    if train.max_grad_norm is not None:
        steps.append(("clip_grad_norm", optax.clip_by_global_norm(train.max_grad_norm)))
    steps += [
        (train.optimizer, _scale_by_optimizer(train, shardings)),
        ("weight_decay", optax.add_decayed_weights(train.weight_decay, mask=decay_mask)),
    ]
    if train.optimizer == "muon" and train.muon.adam_learning_rate_ratio != 1.0:
        steps.append(("adam_learning_rate", optax.masked(optax.scale(train.muon.adam_learning_rate_ratio), _adam_mask)))
    if train.update_rms_clipping is not None:
        steps.append(("clip_update_rms", clip_by_matrix_rms(train.update_rms_clipping)))
    if train.clip_update_norm:
        steps.append(("clip_update_norm", clip_outlying_norm(train.update_norm_window)))
    return optax.named_chain(*steps, ("learning_rate", scale_by_learning_rate_of_step(learning_rate_schedule(train))))


def _scale_by_optimizer(train: SimpleTrainConfig, shardings: Any) -> optax.GradientTransformation:
    match train.optimizer:
        case "adamw":
            return _adam(train)
        case "muon":
            return optax.partition({"muon": scale_by_muon(train.muon, shardings), "adam": _adam(train)}, _muon_labels)
        case "lion":
            return optax.scale_by_lion(b1=train.lion.beta1, b2=train.lion.beta2)
        case "adafactor":
            return _adafactor(train.adafactor)
        case "sophia":
            return scale_by_sophia_g(train.sophia)


def _adam(train: SimpleTrainConfig) -> optax.GradientTransformation:
    """Kingma and Ba 2014."""
    return optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.epsilon, nesterov=train.nesterov)


def _muon_labels(params: Any) -> Any:
    hidden = DECAYED - {"head"}
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path[-1].key in hidden else "adam", params)


def _adam_mask(params: Any) -> Any:
    return jax.tree.map(lambda label: label == "adam", _muon_labels(params))


def _adafactor(adafactor: AdafactorConfig) -> optax.GradientTransformation:
    """Squared gradients as an outer product of their rows' and columns' means, update clipping, momentum."""
    steps: list[optax.GradientTransformation] = [
        optax.scale_by_factored_rms(decay_rate=adafactor.decay_rate, min_dim_size_to_factor=adafactor.min_dim_size_to_factor)
    ]
    if adafactor.clipping_threshold is not None:
        steps.append(clip_by_matrix_rms(adafactor.clipping_threshold))
    if adafactor.momentum is not None:
        steps.append(optax.ema(adafactor.momentum, debias=False))
    return optax.chain(*steps)


def clip_by_matrix_rms(threshold: float) -> optax.GradientTransformation:
    """Shortens the update of each matrix, and each norm, to a root mean square of at most `threshold`.

    Layers are stacked in one array, and each is clipped by itself (`optax.clip_by_block_rms` alone takes the stack for one matrix).
    """
    clip = optax.clip_by_block_rms(threshold)

    def clipped(updates: Any, _: Any) -> Any:
        def clip_each(matrices: Any) -> Any:
            return clip.update(matrices, optax.EmptyState())[0]

        rest = {name: x for name, x in updates.items() if name != "layers"}
        return {**clip_each(rest), "layers": jax.vmap(clip_each)(updates["layers"])}

    return optax.stateless(clipped)


def scale_by_learning_rate_of_step(schedule: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Times -learning rate at `step`, which `update` is given: there is no counter here that could fall behind."""

    def update(updates: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
        rate = -1 * schedule(extra["step"])
        return jax.tree.map(lambda x: jnp.array(rate, dtype=x.dtype) * x, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
