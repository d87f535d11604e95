"""How fast a run goes: tokens a second, model FLOPs utilisation, goodput, time left."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from model.config import LlamaConfig
from model.flops import chip_of, train_flops_per_token


def peak_flops_per_device() -> float:
    """Peak FLOP/s of one device: the published figure of a TPU, elsewhere the best float32 matmul measured now."""
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


class Speedometer:
    """Turns step durations into the `throughput/...` metrics.

    MFU is the fraction of the devices' peak that goes into model FLOPs: `throughput/mfu` counts causal attention at half,
    `throughput/mfu_full_attention` at the whole square. `goodput` is the share of the time since start spent in steps.
    """

    def __init__(self, config: LlamaConfig, seq_len: int, tokens_per_step: int, *, first_step: int, last_step: int) -> None:
        peak = peak_flops_per_device() * jax.device_count()
        self._utilisation = train_flops_per_token(config, seq_len) / peak
        self._utilisation_full = train_flops_per_token(config, seq_len, full_attention=True) / peak
        self._tokens_per_step = tokens_per_step
        self._last_step = last_step
        self._began = self._finished = time.perf_counter()
        self._stepping_seconds = 0.0
        self._smooth: float | None = None
        self._first_step = first_step

    def pause(self) -> None:
        """Time until now since the last step was not spent in steps."""
        self._finished = time.perf_counter()

    def step_done(self, step: int, loading_seconds: float) -> dict[str, float]:
        """Metrics of the step that finished now. The first step of a run compiles and counts as no stepping."""
        now = time.perf_counter()
        duration = now - self._finished
        self._finished = now
        if step > self._first_step + 1:
            self._stepping_seconds += duration
            self._smooth = duration if self._smooth is None else 0.9 * self._smooth + 0.1 * duration
        tokens_per_second = self._tokens_per_step / duration
        return {
            "throughput/duration": duration,
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/mfu": tokens_per_second * self._utilisation,
            "throughput/mfu_full_attention": tokens_per_second * self._utilisation_full,
            "throughput/loading_time": loading_seconds,
            "throughput/total_tokens": float(step * self._tokens_per_step),
            "goodput": self._stepping_seconds / max(now - self._began, 1e-9),
        }

    def seconds_left(self, step: int) -> float | None:
        """Time the steps that are left take at the recent speed; None before there is one."""
        return None if self._smooth is None else (self._last_step - step) * self._smooth

    @property
    def tokens_per_second(self) -> float | None:
        """Recent speed; None before the second step."""
        return None if self._smooth is None else self._tokens_per_step / self._smooth
