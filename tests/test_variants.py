"""Every variant of the model: logits against the definition, counts, decay, generation; those of transformers are in test_hf_golden.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import LlamaConfig, RopeConfig
from model.flops import num_parameters
from model.generate import generate
from model.llama import forward
from model.optimizer import DECAYED, decayed_names
from model.parameters import init_params, logical_axes, param_shapes
from model.preflight.settings import Job
from model.train_config import SimpleTrainConfig
from tests.model_variants import BASE, VARIANTS, random_params, variant
from tests.plain_llama import plain_logits

PROMPTS = [[1, 7, 9], [1, 3, 5, 7, 11, 13, 17, 19, 23, 29]]
logits_of = jax.jit(forward, static_argnames="config")
definition = jax.jit(plain_logits, static_argnames="config")


QUICK = ("qk_norm, own head width, tied", "qkv biases, window", "yarn")  # between them all that a cache has to know


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "yarn"])
def test_logits_are_those_of_the_definition(name: str) -> None:
    config = variant(name)
    params = random_params(config)
    lengths = (9, 1, 14)
    batch = {
        "tokens": jax.random.randint(jax.random.key(2), (2, 24), 0, 64),
        "segment_ids": jnp.tile(jnp.repeat(jnp.arange(3), jnp.array(lengths)), (2, 1)),
        "positions": jnp.tile(jnp.concatenate([jnp.arange(n) for n in lengths]), (2, 1)),
    }
    logits = logits_of(params, batch["tokens"], config, segment_ids=batch["segment_ids"], positions=batch["positions"])
    expected = definition(params, batch, config)
    # machines add in other orders; a wrong formula is wrong in the second digit
    np.testing.assert_allclose(logits, expected, atol=5e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def test_greedy_with_the_cache_equals_forward_from_scratch(name: str) -> None:
    config = variant(name)
    params = random_params(config)
    expected = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(12):
            padded = jnp.array([tokens + [0] * (24 - len(tokens))])
            tokens.append(int(jnp.argmax(logits_of(params, padded, config)[0, len(tokens) - 1])))
        expected.append(tokens[len(prompt) :])
    assert generate(params, config, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0) == expected
    assert len(set(expected[0])) > 3, "a choice at each step"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_count_is_that_of_the_parameter_table_and_only_products_are_decayed(name: str) -> None:
    config = variant(name)
    shapes = param_shapes(config)
    assert num_parameters(config) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    decayed = {path.split("/")[-1] for path in decayed_names(shapes)}
    assert decayed == DECAYED - ({"head"} if config.tie_word_embeddings else set())
    axes = jax.tree.map(lambda leaf, names: len(leaf.shape) == len(names), shapes, logical_axes(config))
    assert all(jax.tree.leaves(axes))


def test_parameters_are_there_only_where_asked_for() -> None:
    params = init_params(variant("all biases, relu"), jax.random.key(0))
    plain = param_shapes(BASE)
    biases = {"bq", "bk", "bv", "bo", "b_gate", "b_up", "b_down"}
    assert params["layers"].keys() - plain["layers"].keys() == biases
    assert not any(np.asarray(params["layers"][name]).any() for name in biases)
    assert set(plain) == {"embed", "norm", "head", "layers"}
    assert set(plain["layers"]) == {"attn_norm", "mlp_norm", "wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}


@pytest.mark.parametrize(("initializer", "residual"), [("normal", 1.0), ("scaled_normal", 1 / math.sqrt(2 * 3))])
def test_normal_initial_weights(initializer: str, residual: float) -> None:
    shape = {"hidden_dim": 64, "intermediate_dim": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 200}
    config = LlamaConfig(**shape, initializer=initializer, initializer_range=0.05, qk_norm=True)
    params = init_params(config, jax.random.key(1))
    matrices = {"embed": params["embed"], "head": params["head"], **{n: x for n, x in params["layers"].items() if x.ndim == 3}}
    for name, weight in matrices.items():
        sigma = 0.05 * (residual if name in ("wo", "w_down") else 1.0)
        np.testing.assert_allclose(np.asarray(weight).std(), sigma, rtol=0.03, err_msg=name)
    assert np.abs(params["embed"]).max() > 3 * 0.05, "not truncated"
    np.testing.assert_array_equal(params["layers"]["q_norm"], 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"use_biases": True}, "no field 'use_biases'"),
        ({"activation_function": "swiglu"}, "activation_function"),
    ],
)
def test_wrong_fields_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "yarn", "factor": 2.0, "mscale": 1.0}, r"rope.mscale=1.0 and rope.mscale_all_dim=None have effect together only"),
        ({"type": "yarn", "beta_fast": 1.0}, r"rope.beta_fast=1.0 must be larger than rope.beta_slow=1.0"),
        ({"type": "yarn", "theta": 1.0}, r"rope.theta=1.0 must be above 1"),
    ],
)
def test_wrong_positions_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**changes)


def test_preflight_refuses_loops_that_it_cannot_count() -> None:
    train = SimpleTrainConfig(train_batch_size=8, num_train_steps=1, learning_rate=1e-3)
    model = BASE.model_copy(update={"seq_len": 1024, "sliding_window": 256, "attn_backend": "flash"})
    with pytest.raises(ValueError, match=r"attn_backend='flash' with model.sliding_window=256: use model.attn_backend='auto'"):
        Job(name="window", model=model, train=train)
    assert Job(name="window", model=model.model_copy(update={"sliding_window": 1024}), train=train).seq_len == 1024
