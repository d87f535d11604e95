"""The Flax front gives the numbers of the pure functions, and trains with Flax's own optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model.config import LlamaConfig
from model.flax_llama import Llama
from model.llama import forward
from model.parameters import init_params

CONFIG = LlamaConfig(seq_len=16, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=40)


def test_same_logits() -> None:
    params = init_params(CONFIG, jax.random.key(1))
    tokens = jnp.arange(32).reshape(2, 16) % 40
    module = Llama(CONFIG, params=params)
    np.testing.assert_array_equal(module(tokens), forward(params, tokens, CONFIG))
    jax.tree.map(np.testing.assert_array_equal, module.params(), params)


def test_trains_with_the_flax_optimizer() -> None:
    module = Llama(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    tokens = jnp.arange(32).reshape(2, 16) % 40

    @nnx.jit
    def step(module: Llama, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(module: Llama) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(module(tokens[:, :-1]), tokens[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value

    losses = [float(step(module, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_needs_one_source_of_weights() -> None:
    with pytest.raises(ValueError, match="one of the two"):
        Llama(CONFIG)
