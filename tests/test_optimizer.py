"""The schedule and the decay mask against values worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import LlamaConfig
from model.optimizer import DECAYED, decay_mask, decayed_names, learning_rate_schedule, make_optimizer
from model.parameters import init_params, param_shapes
from model.train_config import SimpleTrainConfig


def train_config(**changes: object) -> SimpleTrainConfig:
    return SimpleTrainConfig(**{"train_batch_size": 4, "num_train_steps": 100, "learning_rate": 1e-2, **changes})


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (5, 0.5e-2),
        (10, 1e-2),
        (55, 1e-2 * (0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)) + 0.1)),
        (100, 1e-3),
    ],
)
def test_cosine_with_warmup(step: int, expected: float) -> None:
    schedule = learning_rate_schedule(train_config(warmup=10, min_lr_ratio=0.1))
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-6, atol=1e-12)


def test_warmup_below_one_is_a_fraction_and_above_one_is_steps() -> None:
    assert train_config(warmup=0.25).warmup_steps == 25
    assert train_config(warmup=25).warmup_steps == 25
    assert train_config(warmup=0).warmup_steps == 0
    with pytest.raises(ValueError, match=r"warmup=200 steps is more than train.num_train_steps=100"):
        train_config(warmup=200)


def test_linear_and_constant_schedules() -> None:
    linear = learning_rate_schedule(train_config(warmup=0, lr_schedule="linear", min_lr_ratio=0.0))
    np.testing.assert_allclose([linear(0), linear(50), linear(100)], [1e-2, 0.5e-2, 0.0], atol=1e-9)
    constant = learning_rate_schedule(train_config(warmup=2, lr_schedule="constant"))
    np.testing.assert_allclose([constant(1), constant(2), constant(99)], [0.5e-2, 1e-2, 1e-2], rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_decay_is_for_linear_weights_only(tied: bool) -> None:
    shape = {"hidden_dim": 16, "intermediate_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 32}
    config = LlamaConfig(**shape, tie_word_embeddings=tied)
    shapes = param_shapes(config)
    names = {name.split("/")[-1] for name in decayed_names(shapes)}
    assert names == DECAYED - ({"head"} if tied else set())
    mask = decay_mask(shapes)
    assert not mask["embed"]
    assert not mask["norm"]
    assert not mask["layers"]["attn_norm"]
    assert not mask["layers"]["mlp_norm"]


def test_adamw_update_against_its_definition() -> None:
    """Two steps of clip, Adam, decoupled decay and the schedule, in numpy."""
    config = LlamaConfig(hidden_dim=8, intermediate_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=16)
    train = train_config(warmup=0, lr_schedule="constant", weight_decay=0.3, max_grad_norm=0.5)
    optimizer = make_optimizer(train)
    params = init_params(config, jax.random.key(0))
    state = optimizer.init(params)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    first = jax.tree.map(np.zeros_like, expected)
    second = jax.tree.map(np.zeros_like, expected)
    for step in (1, 2):
        grads = jax.tree.map(lambda x, s=step: jnp.sin(s * 37.0 * x + s), params)
        updates, state = optimizer.update(grads, state, params)
        gradients = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
        norm = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
        gradients = jax.tree.map(lambda g, n=norm: g * min(1.0, 0.5 / n), gradients)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, second, gradients)
        expected = jax.tree.map(
            lambda p, m, v, decayed, s=step: (
                p - 1e-2 * (m / (1 - 0.9**s) / (np.sqrt(v / (1 - 0.95**s)) + 1e-8) + (0.3 * p if decayed else 0.0))
            ),
            expected,
            first,
            second,
            decay_mask(params),
        )
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, rtol=2e-5, atol=2e-6), params, expected)
