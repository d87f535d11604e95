"""Outliers, steps that are skipped, the moving average of the weights, and what a resume finds of them."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import partitioning
from model.bad_steps import TooManySkippedSteps, check_skipped_steps, judge_step, no_steps
from model.batch_arithmetic import BatchArithmetic
from model.checkpoint import Checkpoints, restore_params
from model.config import LlamaConfig
from model.feed import place
from model.optimizer_config import OutlierWindow
from model.outliers import ClipUpdateNormState, clip_metrics, clip_outlying_norm
from model.parameters import param_shapes
from model.train_config import SimpleTrainConfig
from model.train_step import TrainState, abstract_state, compile_train_step, init_state

SMALL = OutlierWindow(length=4, min_entries=3, sigma=2.0)
SEQ_LEN, VOCAB = 16, 24
CONFIG = LlamaConfig(
    seq_len=SEQ_LEN, hidden_dim=16, intermediate_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, vocab_size=VOCAB, logit_soft_cap=5.0
)
NAN_STEP, BETA = 2, 0.9


@functools.partial(jax.jit, static_argnums=3)
def judge(recent: Any, loss: float, grad_norm: float, window: OutlierWindow) -> Any:
    return judge_step(recent, jnp.float32(loss), jnp.float32(grad_norm), window)


def test_steps_are_judged_by_the_good_ones_alone() -> None:
    """By hand. After losses 1, 3, 1, 3 the mean is 2 and the deviation 1: above 4 is bad; gradients 1, 1, 1, 1: above 1."""
    nan, inf = float("nan"), float("inf")
    recent, verdicts = no_steps(SMALL), []
    table = [  # loss, gradient norm, good, skipped in a row after it
        (1.0, 1.0, True, 0),
        (nan, 1.0, False, 1),
        (3.0, inf, False, 2),
        (3.0, 1.0, True, 0),
        (1.0, 1.0, True, 0),
        (3.0, 1.0, True, 0),
        (4.1, 1.0, False, 1),
        (2.0, 1.01, False, 2),
        (nan, nan, False, 3),
        (3.9, 1.0, True, 0),  # now 3.9, 3, 1, 3: mean 2.725, deviation 1.05, above 4.83
        (4.9, 1.0, False, 1),
        (-9.0, 0.5, True, 0),
    ]
    for loss, grad_norm, _, _ in table:
        good, recent = judge(recent, loss, grad_norm, SMALL)
        verdicts.append((loss, grad_norm, bool(good), int(recent.skipped)))
    np.testing.assert_array_equal(np.asarray(verdicts), np.asarray(table))
    assert sorted(recent.loss.values_N.tolist()) == [-9.0, 1.0, 3.0, pytest.approx(3.9)]


def test_few_steps_judge_nothing_but_what_is_not_finite() -> None:
    window, recent = SimpleTrainConfig(train_batch_size=1, num_train_steps=1, learning_rate=1).bad_step_window, None
    assert (window.length, window.sigma, window.min_entries) == (128, 6.0, 64)
    recent = no_steps(window)
    for count in range(64):
        assert judge(recent, 1e9, 1.0, window)[0], f"{count} steps are too few"
        recent = judge(recent, 1.0 + 0.1 * (-1) ** count, 1.0, window)[1]
    assert judge(recent, 1.59, 1.0, window)[0]
    assert not judge(recent, 1.61, 1.0, window)[0]


def test_long_updates_are_shortened_to_the_threshold() -> None:
    """By hand: lengths 1, 3, 2 have mean 2 and deviation sqrt(2/3), so 100 becomes 2 + 2 sqrt(2/3), and is remembered as that."""
    clip = clip_outlying_norm(SMALL)
    state = clip.init(None)
    for length in (1.0, 3.0, 2.0):
        updates, state = clip.update({"w": jnp.array([0.6, 0.8]) * length}, state)
        np.testing.assert_allclose(updates["w"], np.array([0.6, 0.8]) * length, rtol=1e-6)
    updates, state = clip.update({"w": jnp.array([60.0, 80.0])}, state)
    threshold = 2 + 2 * (2 / 3) ** 0.5
    np.testing.assert_allclose(updates["w"], np.array([0.6, 0.8]) * threshold, rtol=1e-5)
    assert isinstance(state, ClipUpdateNormState)
    np.testing.assert_allclose(state.recent.values_N, [1, 3, 2, threshold], rtol=1e-5)
    metrics = clip_metrics({"adamw": optax.EmptyState(), "clip_update_norm": state})
    assert float(metrics["optim/clip_update/norm"]) == pytest.approx(100)
    assert float(metrics["optim/clip_update/scale"]) == pytest.approx(threshold / 100, rel=1e-5)


def test_a_run_that_only_skips_is_stopped() -> None:
    train = train_config()
    metrics = {"optim/skipped_steps_in_a_row": 127.0, "train/loss": 9.0, "grad/norm/total": 2.0}
    check_skipped_steps(300, metrics, train)
    with pytest.raises(TooManySkippedSteps, match=r"step 300: the last 128 steps were skipped, loss 9.0.*train.bad_step_window.sigma"):
        check_skipped_steps(300, {**metrics, "optim/skipped_steps_in_a_row": 128.0}, train)


def train_config(**changes: Any) -> SimpleTrainConfig:
    fixed = {"train_batch_size": 8, "num_train_steps": 10, "learning_rate": 1e-2, "warmup": 8, "compute_dtype": "float32"}
    safe = {"skip_bad_steps": True, "ema_beta": BETA, "optimizer": "sophia", "sophia": {"update_interval": 2}, "z_loss_weight": 1e-3}
    return SimpleTrainConfig(**{**fixed, **safe, **changes})


def rows(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    tokens = random.integers(0, VOCAB, (8, SEQ_LEN + 1)).astype(np.int32)
    weights = (random.random((8, SEQ_LEN)) < np.linspace(0.1, 1, 8)[:, None]).astype(np.float32)
    weights[0, 0] = np.nan if step == NAN_STEP else weights[0, 0]
    ones = np.ones((8, SEQ_LEN), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "segment_ids": ones,
        "positions": ones.cumsum(1) - 1,
    }


def run_steps(train: SimpleTrainConfig, devices: int, directory: Path, steps: int = 5) -> tuple[list[TrainState], list[dict[str, float]]]:
    """States before and after each step, and its metrics; half way the run is saved and restored."""
    mesh = partitioning.make_mesh(**train.mesh_sizes, devices=jax.devices()[:devices])
    step = compile_train_step(CONFIG, train, mesh, BatchArithmetic.of(train, devices).num_microbatches, tell=pytest.fail)
    state = init_state(CONFIG, train, mesh)
    states, history = [jax.device_get(state)], []
    for index in range(steps):
        state, metrics = step(state, place(rows(index), partitioning.batch_sharding(mesh)))
        states.append(jax.device_get(state))
        history.append({name: float(value) for name, value in metrics.items() if value.ndim == 0})
        if index == steps // 2:
            checkpoints = Checkpoints(directory, keep_every=1, max_to_keep=1)
            checkpoints.save(index + 1, state, {})
            checkpoints.wait()
            state = TrainState(*checkpoints.restore(abstract_state(CONFIG, train, mesh)))
            checkpoints.close()
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[-1])
    return states, history


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrainState], list[dict[str, float]], Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return *run_steps(train_config(), 1, directory), directory


def test_a_step_with_nan_is_skipped_and_the_run_goes_on(run: Any) -> None:
    states, history, _ = run
    assert [metrics["optim/skipped_step"] for metrics in history] == [0, 0, 1, 0, 0]
    assert [metrics["finite"] for metrics in history] == [1] * 5, "nothing to stop for"
    assert np.isnan(history[NAN_STEP]["train/loss"])
    before, after = states[NAN_STEP], states[NAN_STEP + 1]
    for part in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5]
    kept = [metrics["train/loss"] for index, metrics in enumerate(history) if index != NAN_STEP]
    np.testing.assert_allclose(states[-1].recent.loss.values_N[:5], [*kept, 0.0], rtol=1e-6)


def test_the_learning_rate_follows_the_steps_and_not_the_updates(run: Any) -> None:
    """Early on Sophia moves every weight by the learning rate, which rises by 1e-2 / 8 a step, the skipped one included."""
    states, _, _ = run
    moved = [float(np.abs(new.params["norm"] - old.params["norm"]).max()) for old, new in itertools.pairwise(states)]
    np.testing.assert_allclose(moved, np.array([0, 1, 0, 3, 4]) * 1e-2 / 8, rtol=1e-3, atol=1e-9)


def test_moving_average_of_the_weights(run: Any) -> None:
    states, _, directory = run
    average = jax.tree.map(np.float64, states[0].params)
    for index in (0, 1, 3, 4):  # the steps that were taken
        average = jax.tree.map(lambda old, new: BETA * old + (1 - BETA) * new, average, states[index + 1].params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), states[-1].ema_params, average)
    assert states[-1].eval_params is states[-1].ema_params
    assert np.abs(states[-1].params["head"] - states[-1].ema_params["head"]).max() > 1e-3
    exported = restore_params(directory / "3", param_shapes_here(), field="ema_params")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(exported), states[3].ema_params)


def param_shapes_here() -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=device), param_shapes(CONFIG))


@pytest.mark.slow
def test_all_of_it_on_eight_devices(run: Any, tmp_path: Path) -> None:
    """Targets that the model draws are the same on every mesh and in every number of microbatches."""
    train = train_config(data_parallel_size=2, tensor_parallel_size=2, per_device_parallelism=1)
    states, history = run_steps(train, 8, tmp_path)
    for ours, theirs in zip(history, run[1], strict=True):
        assert ours["optim/skipped_step"] == theirs["optim/skipped_step"]
        np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), states[-1].ema_params, run[0][-1].ema_params)


def test_plain_state_has_neither(tmp_path: Path) -> None:
    train = SimpleTrainConfig(train_batch_size=8, num_train_steps=10, learning_rate=1e-2)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    state = init_state(CONFIG, train, mesh)
    assert state.ema_params is None
    assert state.recent is None
    assert state.eval_params is state.params
    checkpoints = Checkpoints(tmp_path, keep_every=1, max_to_keep=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    restored = TrainState(*checkpoints.restore(abstract_state(CONFIG, train, mesh)))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
