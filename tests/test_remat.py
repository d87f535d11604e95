"""Remat policies: the same gradients, and each keeps more than the one before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import REMAT_POLICIES, LlamaConfig, RematPolicy
from model.llama import hidden_states, init_params

TOKENS = jax.random.randint(jax.random.key(1), (2, 64), 0, 60)


def configuration(policy: RematPolicy | bool) -> LlamaConfig:
    shape = {"seq_len": 64, "hidden_dim": 32, "intermediate_dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 60}
    return LlamaConfig(**shape, gradient_checkpointing=policy)


def loss(params: dict, policy: RematPolicy) -> jax.Array:
    hidden = hidden_states(params, TOKENS, configuration(policy))
    return (hidden * jax.random.normal(jax.random.key(2), hidden.shape)).mean()


@pytest.mark.parametrize("policy", [policy for policy in REMAT_POLICIES if policy != "none"])
def test_gradients_do_not_depend_on_the_policy(policy: RematPolicy) -> None:
    params = init_params(configuration("none"), jax.random.key(0))
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected, actual = gradient(params, "none"), gradient(params, policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max())), expected, actual)


def test_each_policy_keeps_more_than_the_next() -> None:
    params = init_params(configuration("none"), jax.random.key(0))

    def kept_bytes(policy: RematPolicy) -> int:
        backward = jax.eval_shape(lambda p: jax.vjp(lambda q: loss(q, policy), p)[1], params)
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(backward))

    kept = [kept_bytes(policy) for policy in REMAT_POLICIES]
    assert kept == sorted(set(kept), reverse=True)


def test_a_switch_names_a_policy() -> None:
    assert [configuration(switch).remat for switch in (True, False, "save_attn")] == ["full", "none", "save_attn"]
