"""The compiled step against the definition, on one device and on eight, whole and in parts; and what it refuses."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from model import partitioning
from model.batch_arithmetic import BatchArithmetic
from model.config import LlamaConfig
from model.feed import place
from model.train_config import SimpleTrainConfig
from model.train_step import TrainState, abstract_state, compile_train_step, init_state, state_shardings
from tests.plain_llama import loss_terms

SEQ_LEN, BATCH, VOCAB = 32, 16, 60
CAPPED = {"pad_vocab_to_multiple_of": 32, "logit_soft_cap": 0.5}
TIED = {"pad_vocab_to_multiple_of": 32, "tie_word_embeddings": True}


def model_config(**changes: Any) -> LlamaConfig:
    shape = {"hidden_dim": 32, "intermediate_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": VOCAB}
    return LlamaConfig(**{"seq_len": SEQ_LEN, "cross_entropy_block_size": 24, **shape, **changes})


def train_config(**changes: Any) -> SimpleTrainConfig:
    values = {"train_batch_size": BATCH, "num_train_steps": 10, "learning_rate": 1e-2, "warmup": 0, "z_loss_weight": 1e-3}
    return SimpleTrainConfig(**{**values, "compute_dtype": "float32", **changes})


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """A batch with two documents a row and very uneven numbers of counted tokens."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (BATCH, SEQ_LEN + 1)).astype(np.int32)
    cut = random.integers(4, SEQ_LEN - 4, BATCH)
    place_in_row = np.arange(SEQ_LEN, dtype=np.int32)[None]
    second = place_in_row >= cut[:, None]
    weights = random.random((BATCH, SEQ_LEN)) < np.linspace(0.05, 1.0, BATCH)[:, None]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights.astype(np.float32),
        "segment_ids": (1 + second).astype(np.int32),
        "positions": (place_in_row - second * cut[:, None]).astype(np.int32),
    }


@functools.cache
def initial(config: LlamaConfig) -> TrainState:
    """The state before the first step, the same on every mesh."""
    return jax.device_get(init_state(config, train_config(), partitioning.make_mesh(devices=jax.devices()[:1])))


def run_steps(config: LlamaConfig, train: SimpleTrainConfig, devices: int, steps: int = 1) -> tuple[Any, list[dict[str, float]]]:
    """State and metrics after the first steps on the first `devices` devices."""
    mesh = partitioning.make_mesh(**train.mesh_sizes, devices=jax.devices()[:devices])
    state = jax.device_put(initial(config), state_shardings(config, train, mesh))
    step = compile_train_step(config, train, mesh, BatchArithmetic.of(train, devices).num_microbatches, tell=pytest.fail)
    history = []
    for index in range(steps):
        state, metrics = step(state, place(rows(index), partitioning.batch_sharding(mesh)))
        history.append({name: float(value) for name, value in metrics.items() if value.ndim == 0})
    return jax.device_get(state), history


@functools.cache
def expected(config: LlamaConfig) -> tuple[dict[str, float], Any]:
    """Loss terms and gradient of the first step by the definition."""
    weight = train_config().z_loss_weight

    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        terms = loss_terms(params, rows(), config, weight)
        return terms["loss"], terms

    gradient, terms = jax.jit(jax.grad(loss, has_aux=True))(initial(config).params)
    return {name: float(value) for name, value in terms.items()}, jax.device_get(gradient)


def gradient_errors(state: Any, config: LlamaConfig) -> dict[str, float]:
    """Of each weight: how far the first step's gradient is from the definition's, relative to its length.

    After one step AdamW's first moment is the gradient, clipped, times a constant.
    """
    train, gradient = train_config(), expected(config)[1]
    scale = (1 - train.beta1) / max(1.0, float(optax.global_norm(gradient)) / train.max_grad_norm)
    errors = jax.tree.map(
        lambda mu, g: float(np.linalg.norm(mu - scale * g) / np.linalg.norm(scale * g)), state.opt_state["adamw"].mu, gradient
    )
    return {path[-1].key: error for path, error in jax.tree.leaves_with_path(errors)}


@pytest.mark.parametrize(
    ("model", "train", "devices"),
    [
        (CAPPED, {"per_device_parallelism": 4}, 1),
        (CAPPED, {"data_parallel_size": 2, "tensor_parallel_size": 2, "per_device_parallelism": 2}, 8),
        (CAPPED, {"data_parallel_size": 2, "context_parallel_size": 2, "tensor_parallel_size": 2}, 8),
        (TIED, {"context_parallel_size": 4}, 8),
    ],
    ids=["parts", "data-tensor-parts", "data-context-tensor", "fsdp-context"],
)
def test_the_step_is_that_of_the_definition(model: dict[str, Any], train: dict[str, Any], devices: int) -> None:
    config = model_config(**model)
    state, history = run_steps(config, train_config(**train), devices)
    terms, gradient = expected(config)
    for name, value in terms.items():
        np.testing.assert_allclose(history[0]["train/tokens" if name == "weight" else f"train/{name}"], value, rtol=5e-6)
    np.testing.assert_allclose(history[0]["grad/norm/total"], optax.global_norm(gradient), rtol=5e-6)
    assert max(gradient_errors(state, config).values()) < 1e-5


MATRICES = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}


def test_gradients_cross_devices_in_the_dtype_asked_for() -> None:
    config = model_config(**CAPPED)
    state, history = run_steps(config, train_config(gradient_sum_dtype="bfloat16"), devices=2)
    np.testing.assert_allclose(history[0]["train/loss"], expected(config)[0]["loss"], rtol=5e-6)
    errors = gradient_errors(state, config)
    assert all(5e-4 < errors.pop(name) < 5e-3 for name in {*MATRICES, "head"}), "each part is rounded"
    assert max(errors.values()) < 1e-4, "norms and the embedding are summed in float32"


def test_products_of_every_layer_are_quantized() -> None:
    pytest.importorskip("qwix")
    config = model_config(**CAPPED)
    state, history = run_steps(config, train_config(quantized_matmul="int8"), devices=1)
    errors = gradient_errors(state, config)
    assert all(0.01 < errors[name] < 0.3 for name in MATRICES)
    assert 1e-6 < abs(history[0]["train/loss"] / expected(config)[0]["loss"] - 1) < 1e-2


def test_accumulation_on_eight_devices() -> None:
    whole_state, whole = run_steps(model_config(), train_config(), devices=1, steps=2)
    parts_state, parts = run_steps(model_config(), train_config(per_device_parallelism=1), devices=8, steps=2)
    np.testing.assert_allclose(parts[1]["train/loss"], whole[1]["train/loss"], rtol=3e-6)
    assert int(parts_state.step) == int(whole_state.step) == 2


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    config, train = model_config(), train_config()
    state = init_state(config, train, mesh)
    state = state._replace(params={**state.params, "norm": state.params["norm"] * np.inf})
    before = jax.device_get(state)
    after, metrics = compile_train_step(config, train, mesh, 1, tell=pytest.fail)(state, place(rows(), partitioning.batch_sharding(mesh)))
    assert not bool(metrics["finite"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_same_seed_same_weights_on_any_mesh() -> None:
    config, train = model_config(), train_config()
    one = init_state(config, train, partitioning.make_mesh(devices=jax.devices()[:1]))
    eight = init_state(config, train, partitioning.make_mesh(tensor=2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(eight))


def test_moments_are_sharded_like_their_weights() -> None:
    mesh = partitioning.make_mesh()
    config, train = model_config(), train_config()
    placed = state_shardings(config, train, mesh)
    shards = [leaf.sharding.spec for leaf in jax.tree.leaves(abstract_state(config, train, mesh)) if leaf.shape == (2, 64, 32)]
    assert len(shards) == 9  # the three feed-forward weights, and both moments of each
    assert all("fsdp" in spec for spec in shards)
    assert placed.step.spec == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"train_batch_size": 10}, 8, r"train.train_batch_size=10 does not divide over 8 devices.*use a multiple of 8"),
        ({"per_device_parallelism": 3}, 1, r"train.per_device_parallelism=3 does not divide the 16 sequences"),
        ({"tensor_parallel_size": 3}, 8, r"train.tensor_parallel_size=3 does not divide the 8 device"),
    ],
)
def test_batch_that_does_not_come_out_even(changes: dict[str, int], devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchArithmetic.of(train_config(**changes), devices)


def test_options_that_the_compiler_refuses_are_left_out_and_said() -> None:
    config, mesh, told = model_config(), partitioning.make_mesh(devices=jax.devices()[:1]), []
    batch = place(rows(), partitioning.batch_sharding(mesh))

    def loss(**options: str) -> float:
        train = train_config(compiler_options=options)
        step = compile_train_step(config, train, mesh, 1, tell=told.append)
        return float(step(init_state(config, train, mesh), batch)[1]["train/loss"])

    plain = loss()
    assert loss(xla_cpu_enable_fast_min_max="True") == pytest.approx(plain)
    assert told == []
    assert loss(xla_tpu_no_such_option="true") == plain
    assert len(told) == 1
    assert "xla_tpu_no_such_option" in told[0]
    assert "compiled without them" in told[0]


def test_options_reach_the_compiler(tmp_path: Path) -> None:
    config, mesh = model_config(), partitioning.make_mesh(devices=jax.devices()[:1])
    compile_train_step(config, train_config(compiler_options={"xla_dump_to": str(tmp_path)}), mesh, 1, tell=pytest.fail)
    assert list(tmp_path.glob("*step*"))
