"""How fast a run goes: tokens a second, model FLOPs utilisation, goodput, time left."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from model.batch_schedule import BatchSchedule
from model.config import LlamaConfig
from model.flops import chip_of, num_parameters, train_flops_per_token
from model.origin import ANEW, Origin


@functools.cache
def peak_flops_per_device() -> float:
    """Peak FLOP/s of one device: the published figure of a TPU, elsewhere the best float32 matmul measured once."""
    device = jax.local_devices()[0]
    chip = chip_of(device.device_kind)
    return chip.bf16_flops if chip is not None else _measured_matmul_flops() / jax.local_device_count()


def _measured_matmul_flops(size: int = 1024, repeats: int = 5) -> float:
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()
    best = min(_seconds(lambda: multiply(x, x).block_until_ready()) for _ in range(repeats))
    return 2.0 * size**3 / best


def _seconds(work: object) -> float:
    began = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - began


def run_constants(config: LlamaConfig, seq_len: int) -> dict[str, int | float | str]:
    """What does not change while a run goes, for the configuration that trackers show.

    FLOPs are model FLOPs with causal attention at half, per second and device the peak that MFU is a share of.
    """
    peak = peak_flops_per_device()
    return {
        "parameter_count": num_parameters(config),
        "backend": jax.default_backend(),
        "num_devices": jax.device_count(),
        "num_hosts": jax.process_count(),
        "throughput/device_kind": jax.local_devices()[0].device_kind,
        "throughput/theoretical_flops_per_device": peak,
        "throughput/theoretical_flops": peak * jax.device_count(),
        "throughput/flops_per_example": train_flops_per_token(config, seq_len) * seq_len,
    }


class Speedometer:
    """Turns step durations into the `throughput/...` metrics.

    MFU is the fraction of the devices' peak that goes into model FLOPs: `throughput/mfu` counts causal attention at half,
    `throughput/mfu_full_attention` at the whole square. `goodput` is the share of the time since start spent in steps.
    `throughput/hook_time` is what hooks took since the last row with it, in seconds; gigaflops are model FLOPs, attention at half.
    """

    def __init__(
        self, config: LlamaConfig, seq_len: int, batch_sizes: BatchSchedule, *, first_step: int, last_step: int, origin: Origin = ANEW
    ) -> None:
        peak = peak_flops_per_device() * jax.device_count()
        self._flops_per_token = train_flops_per_token(config, seq_len)
        self._utilisation = self._flops_per_token / peak
        self._utilisation_full = train_flops_per_token(config, seq_len, full_attention=True) / peak
        self._batch_sizes, self._seq_len, self._origin = batch_sizes, seq_len, origin
        self._hook_seconds: float | None = None
        self._last_step = last_step
        self._began = self._finished = time.perf_counter()
        self._stepping_seconds = 0.0
        self._smooth: float | None = None  # recent seconds a token
        self._first_step = first_step

    def pause(self) -> None:
        """Time until now since the last step was not spent in steps but in hooks; before the first step, in starting."""
        now = time.perf_counter()
        if self._hook_seconds is not None:
            self._hook_seconds += now - self._finished
        self._finished = now

    def hook_time(self) -> dict[str, float]:
        """`throughput/hook_time`: seconds in hooks since the last call."""
        seconds, self._hook_seconds = self._hook_seconds or 0.0, 0.0
        return {"throughput/hook_time": seconds}

    def step_done(self, step: int, loading_seconds: float) -> dict[str, float]:
        """Metrics of the step that finished now. The first step of a run compiles and counts as no stepping."""
        now = time.perf_counter()
        duration = now - self._finished
        self._finished = now
        tokens = self._batch_sizes.size_at(step - 1) * self._seq_len
        if step > self._first_step + 1:
            self._stepping_seconds += duration
            self._smooth = duration / tokens if self._smooth is None else 0.9 * self._smooth + 0.1 * duration / tokens
        if self._hook_seconds is None:
            self._hook_seconds = 0.0
        tokens_per_second = tokens / duration
        total_tokens = float(self.tokens_until(step))
        return {
            "run_progress": step / self._last_step,
            "throughput/duration": duration,
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/mfu": tokens_per_second * self._utilisation,
            "throughput/mfu_full_attention": tokens_per_second * self._utilisation_full,
            "throughput/loading_time": loading_seconds,
            "throughput/examples_per_second": tokens_per_second / self._seq_len,
            "throughput/gflops_per_second": tokens_per_second * self._flops_per_token / 1e9,
            "throughput/total_tokens": total_tokens,
            "throughput/total_gflops": total_tokens * self._flops_per_token / 1e9,
            "goodput": self._stepping_seconds / max(now - self._began, 1e-9),
        }

    def seconds_left(self, step: int) -> float | None:
        """Time the steps that are left take at the recent speed; None before there is one."""
        return None if self._smooth is None else (self.tokens_until(self._last_step) - self.tokens_until(step)) * self._smooth

    @property
    def tokens_per_second(self) -> float | None:
        """Recent speed; None before the second step."""
        return None if self._smooth is None else 1 / self._smooth

    def tokens_until(self, step: int) -> int:
        """What the weights have seen before `step`: in this run, and before it where it goes on from a checkpoint."""
        return self._origin.tokens + self._origin.rows_until(self._batch_sizes, step) * self._seq_len
