"""The parameter table: sizes, initial distribution, and what refuses to be built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import LlamaConfig
from model.flops import num_parameters
from model.parameters import init_params, logical_axes, param_shapes

SMALL = LlamaConfig(seq_len=16, hidden_dim=64, intermediate_dim=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=24, vocab_size=200)


def test_shapes_axes_and_initial_values_have_one_structure() -> None:
    params = init_params(SMALL, jax.random.key(0))
    shapes = param_shapes(SMALL)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    axes = jax.tree.map(lambda shape, names: len(shape.shape) == len(names), shapes, logical_axes(SMALL))
    assert all(jax.tree.leaves(axes))
    assert num_parameters(SMALL) == sum(x.size for x in jax.tree.leaves(params))


def test_padding_adds_rows_to_the_embedding_and_columns_to_the_head() -> None:
    shapes = param_shapes(SMALL.model_copy(update={"pad_vocab_to_multiple_of": 128}))
    assert (shapes["embed"].shape, shapes["head"].shape) == ((256, 64), (64, 256))


def test_tied_model_has_no_head() -> None:
    tied = SMALL.model_copy(update={"tie_word_embeddings": True})
    assert "head" not in init_params(tied, jax.random.key(0))
    assert num_parameters(SMALL) - num_parameters(tied) == 200 * 64


@pytest.mark.parametrize(
    ("name", "fan_in"), [("wq", 64), ("wk", 64), ("wv", 64), ("wo", 4 * 24), ("w_gate", 64), ("w_up", 64), ("w_down", 96), ("head", 64)]
)
def test_linear_weights_are_truncated_normal_of_the_fan_in(name: str, fan_in: int) -> None:
    params = init_params(SMALL, jax.random.key(1))
    weight = np.asarray(params[name] if name == "head" else params["layers"][name]) * np.sqrt(fan_in)
    assert np.abs(weight).max() <= 3.0
    # The standard deviation of a normal cut at 3 sigma is 0.9866.
    np.testing.assert_allclose(weight.std(), 0.9866, rtol=0.03)
    np.testing.assert_allclose(weight.mean(), 0.0, atol=0.05)


def test_embedding_is_small_and_norms_are_one() -> None:
    params = init_params(SMALL, jax.random.key(2))
    np.testing.assert_allclose(np.asarray(params["embed"]).std() * 64, 0.9866, rtol=0.03)
    for norm in (params["norm"], params["layers"]["attn_norm"], params["layers"]["mlp_norm"]):
        np.testing.assert_array_equal(norm, jnp.ones_like(norm))


def test_same_key_same_weights_and_no_two_matrices_alike() -> None:
    first, again = init_params(SMALL, jax.random.key(3)), init_params(SMALL, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["layers"]["wk"], first["layers"]["wv"])
    assert not np.array_equal(first["layers"]["wq"][0], first["layers"]["wq"][1])


def test_unset_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size is unset"):
        init_params(LlamaConfig(hidden_dim=64, num_heads=4, num_kv_heads=4), jax.random.key(0))
