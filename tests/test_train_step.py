"""The step on eight devices against one device, and gradient accumulation against the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import partitioning
from model.batch_arithmetic import BatchArithmetic
from model.config import LlamaConfig, RopeConfig
from model.feed import place
from model.train_config import SimpleTrainConfig
from model.train_step import abstract_state, compile_train_step, init_state, make_train_step, state_shardings

SEQ_LEN, BATCH, VOCAB = 32, 16, 64


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


def run_steps(config: LlamaConfig, train: SimpleTrainConfig, devices: int, steps: int = 1) -> tuple[Any, list[dict[str, float]]]:
    """State and metrics after the first steps on the first `devices` devices."""
    mesh = partitioning.make_mesh(data=train.data_parallel_size, tensor=train.tensor_parallel_size, devices=jax.devices()[:devices])
    state = init_state(config, train, mesh)
    step = make_train_step(config, train, mesh, BatchArithmetic.of(train, devices).num_microbatches)
    history = []
    for index in range(steps):
        state, metrics = step(state, place(rows(index), partitioning.batch_sharding(mesh)))
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


def assert_same_gradient(one: Any, other: Any) -> None:
    """After one step AdamW's first moment is the clipped gradient times a constant: equal relative to its largest entry."""
    for alone, together in zip(jax.tree.leaves(one.opt_state[1].mu), jax.tree.leaves(other.opt_state[1].mu), strict=True):
        scale = np.abs(alone).max()
        assert scale > 0
        np.testing.assert_allclose(together / scale, alone / scale, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        {"data_parallel_size": 2, "tensor_parallel_size": 2},
        pytest.param({"data_parallel_size": 8}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(sizes: dict[str, int]) -> None:
    config = model_config(rope=RopeConfig(type="llama3", theta=1e4, factor=2.0, original_max_position_embeddings=16))
    one_state, one = run_steps(config, train_config(), devices=1)
    eight_state, eight = run_steps(config, train_config(**sizes), devices=8)
    for alone, together in zip(one, eight, strict=True):
        for name in ("train/loss", "train/cross_entropy", "train/z_loss", "grad/norm/total", "train/tokens"):
            np.testing.assert_allclose(together[name], alone[name], rtol=3e-6)
    assert_same_gradient(one_state, eight_state)


def test_accumulation_with_uneven_token_counts_equals_the_whole_batch() -> None:
    whole_state, whole = run_steps(model_config(), train_config(), devices=1)
    parts_state, parts = run_steps(model_config(), train_config(per_device_parallelism=4), devices=1)
    for name in ("train/loss", "train/z_loss", "grad/norm/total", "train/tokens"):
        np.testing.assert_allclose(parts[0][name], whole[0][name], rtol=2e-6)
    assert_same_gradient(whole_state, parts_state)


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
    after, metrics = make_train_step(config, train, mesh, 1)(state, place(rows(), partitioning.batch_sharding(mesh)))
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
