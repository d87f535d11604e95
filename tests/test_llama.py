"""The decoder's own properties; equality with transformers is in test_hf_golden.py and test_hf_oracle.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import LlamaConfig
from model.linear import Precision
from model.llama import forward as forward_unjitted
from model.llama import hidden_states, init_params, output_head

CONFIG = LlamaConfig(seq_len=32, hidden_dim=32, intermediate_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=60)
forward = jax.jit(forward_unjitted, static_argnames=("config", "compute_dtype"))
TOKENS = jax.random.randint(jax.random.key(1), (2, 32), 0, 60)


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(CONFIG, jax.random.key(0))


def test_logits_are_float32_of_the_vocabulary(params: dict) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = forward(params, TOKENS, CONFIG, compute_dtype=dtype)
        assert logits.shape == (2, 32, 60)
        assert logits.dtype == jnp.float32
        assert hidden_states(params, TOKENS, CONFIG, precision=Precision(dtype)).dtype == dtype


def test_bfloat16_stays_close_to_float32(params: dict) -> None:
    exact, rounded = (forward(params, TOKENS, CONFIG, compute_dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert 0 < jnp.abs(exact - rounded).max() < 0.05 * jnp.abs(exact).max()


def test_no_token_sees_a_later_one(params: dict) -> None:
    changed = TOKENS.at[:, 20].set((TOKENS[:, 20] + 1) % 60)
    before, after = forward(params, TOKENS, CONFIG), forward(params, changed, CONFIG)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(axis=-1).all()


@pytest.mark.parametrize("with_positions", [True, False])
def test_packed_documents_give_the_logits_of_each_alone(params: dict, with_positions: bool) -> None:
    cuts = (0, 5, 6, 32)
    lengths = np.diff(cuts)
    segment_ids = jnp.asarray(np.repeat([7, 3, 9], lengths))[None].repeat(2, 0)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths]))[None].repeat(2, 0) if with_positions else None
    packed = forward(params, TOKENS, CONFIG, segment_ids=segment_ids, positions=positions)
    for start, stop in itertools.pairwise(cuts):
        alone = forward(params, TOKENS[:, start:stop], CONFIG)
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=2e-5)


def test_switches_change_rounding_at_most(params: dict) -> None:
    def loss_and_gradient(config: LlamaConfig) -> tuple[jax.Array, dict]:
        return jax.jit(jax.value_and_grad(lambda p: (forward(p, TOKENS, config) ** 2).mean()))(params)

    loss, gradient = loss_and_gradient(CONFIG)
    for switch in ({"scan_layers": False}, {"gradient_checkpointing": False}):
        other_loss, other_gradient = loss_and_gradient(CONFIG.model_copy(update=switch))
        np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max())), gradient, other_gradient)


def test_long_rows_take_flash_attention_and_agree_with_plain() -> None:
    config = LlamaConfig(seq_len=1024, hidden_dim=16, intermediate_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=30)
    weights = init_params(config, jax.random.key(4))
    tokens = jax.random.randint(jax.random.key(5), (1, 1024), 0, 30)
    logits = {flash: forward(weights, tokens, config.model_copy(update={"use_flash_attention": flash})) for flash in (True, False)}
    np.testing.assert_allclose(logits[True], logits[False], atol=1e-5)
    assert not np.array_equal(logits[True], logits[False]), "both switches ran the same code"


def test_tied_model_uses_the_embedding_as_head() -> None:
    config = CONFIG.model_copy(update={"tie_word_embeddings": True})
    params = init_params(config, jax.random.key(0))
    np.testing.assert_array_equal(output_head(params), params["embed"].T)
    x = hidden_states(params, TOKENS, config)
    np.testing.assert_allclose(forward(params, TOKENS, config), x @ params["embed"].T, atol=1e-5)


def test_padding_of_the_vocabulary_has_no_logits() -> None:
    config = CONFIG.model_copy(update={"pad_vocab_to_multiple_of": 32})
    params = init_params(config, jax.random.key(0))
    assert params["head"].shape == (32, 64)
    without = {**params, "embed": params["embed"][:60], "head": params["head"][:, :60]}
    np.testing.assert_array_equal(forward(params, TOKENS, config), forward(without, TOKENS, CONFIG))


def test_numpy_parameters_and_tokens_are_accepted(params: dict) -> None:
    on_host = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(forward_unjitted(on_host, np.asarray(TOKENS), CONFIG), forward(params, TOKENS, CONFIG), atol=1e-5)
