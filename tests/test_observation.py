"""What a run says about itself: norms, memory, profile, speed, and the lines of its log."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import memory, profiler, speed
from model.batch_schedule import BatchSchedule
from model.config import LlamaConfig
from model.flops import num_parameters, train_flops_per_token
from model.memory import memory_metrics
from model.norms import named_norms, per_layer_norms
from model.origin import Origin
from model.parameters import param_shapes
from model.profiler import Profiler
from model.speed import Speedometer, run_constants

CONFIG = LlamaConfig(seq_len=16, hidden_dim=16, intermediate_dim=32, num_layers=3, num_heads=2, num_kv_heads=1, vocab_size=32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_of_every_parameter_are_numpys(dtype: Any) -> None:
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda shape: jnp.asarray(random.normal(size=shape.shape), dtype), param_shapes(CONFIG))
    norms = jax.jit(lambda tree: per_layer_norms(tree, "params/norm"))(params)
    assert {norm.dtype for norm in norms.values()} == {jnp.dtype(jnp.float32)}
    assert norms["params/norm/layers/wq"].shape == (3,)
    named = named_norms(jax.device_get(norms))

    expected: dict[str, float] = {}
    arrays = {name: np.asarray(x, np.float64) for name, x in {**params, **params["layers"]}.items() if name != "layers"}
    for name, array in arrays.items():
        if name in params["layers"]:
            expected |= {f"params/norm/layers/{name}/{layer}": float(np.linalg.norm(array[layer])) for layer in range(3)}
        else:
            expected[f"params/norm/{name}"] = float(np.linalg.norm(array))
    expected["params/norm/total"] = float(np.sqrt(sum(norm**2 for norm in expected.values())))
    assert named.keys() == expected.keys()
    assert named == pytest.approx(expected, rel=1e-5)


def test_large_half_precision_gradients_do_not_overflow_in_their_squares() -> None:
    norms = per_layer_norms({"embed": jnp.full((4,), 60_000, jnp.float16)}, "grad/norm")
    assert named_norms(jax.device_get(norms)) == {"grad/norm/total": 120_000.0, "grad/norm/embed": 120_000.0}


def test_memory_of_the_host_here_and_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory_metrics()
    assert before.keys() == {"host/memory_gib"}  # a CPU device counts nothing
    untouched = np.empty(2**32, np.uint8)  # address space, no memory
    assert memory_metrics()["host/memory_gib"] < before["host/memory_gib"] + untouched.nbytes / 2**30 / 2
    held = np.ones(2**26, np.uint8)
    assert memory_metrics()["host/memory_gib"] >= before["host/memory_gib"] + held.nbytes / 2**30 * 0.9
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"bytes_in_use": n * 2**30, "peak_bytes_in_use": 2 * n * 2**30}) for n in (1, 3)]
    monkeypatch.setattr(memory.jax, "local_devices", lambda: devices)
    assert {key: value for key, value in memory_metrics().items() if key.startswith("device")} == {
        "device/memory_gib": 3.0,
        "device/peak_memory_gib": 6.0,
    }


def profile(directory: Path, steps: int, said: list[str], **options: Any) -> None:
    watched = Profiler(directory, **{"enabled": True, "start_step": 2, "num_steps": 3, "tell": said.append, **options})
    for _ in range(steps):
        jnp.ones(3).block_until_ready()
        watched.step_done()
    watched.close()


def test_a_window_of_steps_is_traced(tmp_path: Path) -> None:
    said: list[str] = []
    profile(tmp_path / "profile", 9, said)
    assert said == [f"a trace of 3 steps is in {tmp_path / 'profile'}"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_trace_ends_with_the_run_and_counts_the_steps_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    said: list[str] = []
    profile(Path("p"), 4, said)
    assert (calls, said) == (["start", "stop"], ["a trace of 2 steps is in p"])
    watched = Profiler(Path("p"), enabled=True, start_step=1, num_steps=1, tell=said.append)
    for expected in (3, 4, 4):  # the window ends by itself too
        watched.step_done()
        assert len(calls) == expected
    del calls[2:], said[1:]
    profile(Path("p"), 9, said, enabled=False)
    profile(Path("p"), 1, said)
    assert (calls, len(said)) == (["start", "stop"], 1)


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_is_one_message(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("only one profiler")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(profiler.jax.profiler, name, fail if name == broken else lambda *_: None)
    said: list[str] = []
    profile(Path("p"), 9, said)
    what = "start" if broken == "start_trace" else "write its trace"
    assert said == [f"the profiler did not {what} (only one profiler): training goes on without it"]


def test_speed_is_counted_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    monkeypatch.setattr(speed, "peak_flops_per_device", lambda: 1e12)
    meter = Speedometer(CONFIG, 16, BatchSchedule.of(4), first_step=0, last_step=10)
    now = 5.0
    meter.pause()  # compiling, no hook
    now = 6.0
    assert meter.step_done(1, 0.0)["throughput/examples_per_second"] == 4.0
    assert meter.hook_time() == {"throughput/hook_time": 0.0}
    now = 9.0
    meter.pause()
    now = 11.0
    metrics = meter.step_done(2, 0.5)
    flops = train_flops_per_token(CONFIG, 16)
    assert metrics["throughput/duration"] == 2.0
    assert metrics["throughput/loading_time"] == 0.5
    assert metrics["throughput/examples_per_second"] == 2.0
    assert metrics["throughput/gflops_per_second"] == pytest.approx(32 * flops / 1e9)
    assert metrics["throughput/total_gflops"] == pytest.approx(128 * flops / 1e9)
    assert metrics["throughput/mfu"] == pytest.approx(32 * flops / 1e12 / jax.device_count())
    assert metrics["run_progress"] == 0.2
    assert meter.hook_time() == {"throughput/hook_time": 3.0}
    assert meter.hook_time() == {"throughput/hook_time": 0.0}


def test_tokens_are_those_that_the_weights_have_seen_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_flops_per_device", lambda: 1e12)
    meter = Speedometer(CONFIG, 16, BatchSchedule.of(4), first_step=5, last_step=10, origin=Origin(5, 0, 1_000))
    assert meter.step_done(6, 0.0)["throughput/total_tokens"] == 1_000 + 4 * 16
    assert meter.tokens_until(10) == 1_000 + 5 * 4 * 16


def test_constants_of_a_run_for_the_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_flops_per_device", lambda: 1e12)
    constants = run_constants(CONFIG, 16)
    assert constants == {
        "parameter_count": num_parameters(CONFIG),
        "backend": "cpu",
        "num_devices": jax.device_count(),
        "num_hosts": 1,
        "throughput/device_kind": jax.devices()[0].device_kind,
        "throughput/theoretical_flops_per_device": 1e12,
        "throughput/theoretical_flops": 1e12 * jax.device_count(),
        "throughput/flops_per_example": 16 * train_flops_per_token(CONFIG, 16),
    }


def log_lines(monkeypatch: pytest.MonkeyPatch, times: list[float], every: int) -> list[int]:
    """The steps that get a line in the log, where step 1 + i ends at `times[i]`."""
    from tasks import training_report

    lines: list[int] = []
    logger = SimpleNamespace(info=lambda text, *values: lines.append(values[0]))
    monkeypatch.setattr(training_report, "get_run_logger", lambda: logger)
    monkeypatch.setattr(training_report.time, "monotonic", lambda: now)
    train = SimpleNamespace(num_train_steps=len(times), steps_per_log=every)
    job: Any = SimpleNamespace(train=train, name="run")
    report = training_report.TrainingReport(job)
    for step, now in zip(itertools.count(1), times, strict=False):  # noqa: B007
        report.on_event({"event": "progress", "step": step, "loss": 1.0, "tokens_per_second": 1.0, "seconds_left": 1.0})
    return lines


def test_without_a_terminal_every_logged_step_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_lines(monkeypatch, [100.0 + 2 * i for i in range(12)], every=5) == [1, 5, 10, 12]


def test_lines_are_a_second_apart_and_the_last_step_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_lines(monkeypatch, [100.0 + 0.125 * i for i in range(21)], every=1) == [1, 9, 17, 21]


def test_after_going_back_the_steps_have_lines_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import training_report

    lines: list[int] = []
    logger = SimpleNamespace(info=lambda text, *values: lines.append(values[0]) if text.startswith("step") else None, warning=print)
    clock = itertools.count(100, 2)
    monkeypatch.setattr(training_report, "get_run_logger", lambda: logger)
    monkeypatch.setattr(training_report.time, "monotonic", lambda: next(clock))
    job: Any = SimpleNamespace(train=SimpleNamespace(num_train_steps=99, steps_per_log=5), name="run")
    report = training_report.TrainingReport(job)
    start = {"event": "start", "start_step": 0, "skipped_checkpoints": [], "notes": [], "skipped_rows": 0, "mesh": {}, "num_parameters": 1}
    start |= {"device_kind": "cpu", "microbatches": 1, "decayed": [], "planned": {}, "held_out": ["a"]}
    for first in (0, 5):
        report.on_event({**start, "start_step": first})
        for step in range(first + 1, 21):
            report.on_event({"event": "progress", "step": step, "loss": 1.0, "tokens_per_second": 1.0, "seconds_left": 1.0})
    assert lines == [1, 5, 10, 15, 20, 6, 10, 15, 20]
