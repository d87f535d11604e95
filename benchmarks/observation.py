"""What watching a run costs: the train loop with everything on (ours) beside the same loop with nothing (peer), in one process.

Everything: progress events, the watchdog, norms of every parameter and gradient in the step, every tenth step a row in metrics.jsonl
with them, speed and memory, a synced file every fiftieth, and TensorBoard and W&B, offline, where they are installed. Nothing: a step
is started, the loss of the one before it is read. The rounds take turns on one state, so that both meet the same machine. A round's
number is its mean over all its steps, so the tenth step's work counts. What W&B's own process takes is said beside (its start and end
included); it shares the cores, so it is in the wall time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import OURS, PEER, bar, child, compare, main, peak_rss_mib
from train_step import BATCH_SIZE, SEED, shape

MOST = 1.02
STEPS, STEPS_PER_LOG, STEPS_PER_SYNC = 10, 10, 50
TURNS = 4  # short turns many times: what else the machine does meets both alike
UNITS = {"cpu_s": "CPU-seconds / step", "wall_s": "seconds / step"}


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Measures in one child process; the bar is held against the ratio of the medians, of CPU and of wall time."""
    found = child(__file__, side=OURS, rounds=TURNS * rounds, case="small" if quick else "debug")
    metrics = compare(found["measured"], UNITS)
    notes = {key.replace("_", " "): str(found[key]) for key in ("trackers", "keys_in_a_row", "cpu_s_of_other_processes")}
    result = {"what": "a train loop that is watched (ours) beside one that is not (peer)", "packages": ["jax", "wandb", "tensorboardX"]}
    case = f"{found['what']}, {STEPS} steps a round"
    bars = [] if quick else [bar(f"{unit}, watched over not", metrics[name]["ratio"], at_most=MOST) for name, unit in UNITS.items()]
    return result | {"cases": [{"case": case, "rounds": TURNS * rounds, "notes": notes, "metrics": metrics}], "bars": bars}


class Loop:
    """A train loop on one batch, as `model.trainer` runs it: a step is started, then the one before it is read."""

    def __init__(self, case: str) -> None:
        import numpy as np

        from model.feed import place
        from model.flops import num_parameters
        from model.partitioning import batch_sharding, make_mesh
        from model.train_config import SimpleTrainConfig
        from model.train_step import compile_train_step, init_state

        self.config, mesh = small() if case == "small" else shape(case), make_mesh()
        fixed: dict[str, Any] = {"train_batch_size": BATCH_SIZE, "num_train_steps": 10**6, "learning_rate": 1e-3}
        trains = {watched: SimpleTrainConfig(**fixed, compute_dtype="float32", seed=SEED, watch_norms=watched) for watched in (True, False)}
        self.state = init_state(self.config, trains[True], mesh)
        self.steps = {watched: compile_train_step(self.config, train, mesh, 1, tell=print) for watched, train in trains.items()}
        window_BS = np.random.default_rng(SEED).integers(0, 2048, (BATCH_SIZE, self.config.seq_len + 1), dtype=np.int32)
        ones_BS = np.ones_like(window_BS[:, 1:])
        positions_BS = np.broadcast_to(np.arange(self.config.seq_len, dtype=np.int32), ones_BS.shape)
        arrays = {"tokens": window_BS[:, :-1], "targets": window_BS[:, 1:], "segment_ids": ones_BS, "positions": positions_BS}
        self.batch = place(arrays | {"loss_weights": ones_BS.astype(np.float32)}, batch_sharding(mesh))
        self.what = f"{case} ({num_parameters(self.config) / 1e6:.1f} million parameters, batch {BATCH_SIZE} x {self.config.seq_len})"
        self.step = 0

    def round(self, steps: int, watched: bool, record: Callable[[int, dict[str, Any]], None]) -> dict[str, float]:
        """Means of a round of steps; `record` gets the metrics of each, with the norms of every parameter where it is `watched`."""
        pending: tuple[int, Any] | None = None
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.steps[watched](self.state, self.batch)
            self.step += 1
            if pending is not None:
                record(*pending)
            pending = self.step, metrics
        assert pending is not None
        record(*pending)
        return {"cpu_s": (time.process_time() - cpu) / steps, "wall_s": (time.perf_counter() - wall) / steps}


class Watched:
    """Everything that watches a run."""

    def __init__(self, loop: Loop, directory: Path, trackers: tuple[Any, ...]) -> None:
        from model.batch_schedule import BatchSchedule
        from model.metrics import MetricsLog
        from model.speed import Speedometer, run_constants
        from model.trackers import open_trackers
        from model.watchdog import Watchdog

        constants = run_constants(loop.config, loop.config.seq_len)
        opened = open_trackers(trackers, directory, run_id="0" * 16, name="watched", tags=(), config=constants, tell=_fail)
        self.metrics = MetricsLog(directory / "metrics.jsonl", 0, opened)
        self.speed = Speedometer(loop.config, loop.config.seq_len, BatchSchedule.of(BATCH_SIZE), first_step=0, last_step=10**6)
        self.watchdog = Watchdog(directory, minutes=15)
        self.keys_in_a_row = 0

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """What a trainer does with the metrics of one step."""
        import jax

        from model.child import emit
        from model.memory import memory_metrics
        from model.norms import named_norms

        logged = step % STEPS_PER_LOG == 0
        values = named_norms(jax.device_get({name: value for name, value in metrics.items() if logged or value.ndim == 0}))
        self.watchdog.beat(step)
        speed = self.speed.step_done(step, 0.0)
        if logged:
            row = {**values, **speed, **self.speed.hook_time(), **memory_metrics()}
            self.keys_in_a_row = len(row)
            self.metrics.log(step, row)
        if step % STEPS_PER_SYNC == 0:
            self.metrics.sync()
        left = self.speed.seconds_left(step)
        emit("progress", step=step, loss=values["train/loss"], tokens_per_second=self.speed.tokens_per_second, seconds_left=left)

    def close(self) -> None:
        """Waits for the trackers."""
        self.watchdog.close()
        if not self.metrics.close():
            raise RuntimeError("a tracker did not end")


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """The one child process: rounds by turns, after one of each that is not counted."""
    os.environ.pop("WANDB_API_KEY", None)
    os.environ["WANDB_SILENT"] = "true"
    packages = {"tensorboard": "tensorboardX", "wandb": "wandb"}
    trackers = tuple(name for name, package in packages.items() if importlib.util.find_spec(package))
    measured: dict[str, list[dict[str, float]]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory() as directory, Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        loop = Loop(spec["case"])
        watched = Watched(loop, Path(directory), trackers)
        rounds: dict[str, Callable[[int], dict[str, float]]] = {
            OURS: lambda steps: loop.round(steps, True, watched.record),
            PEER: lambda steps: loop.round(steps, False, _read),
        }
        for take in rounds.values():
            take(STEPS_PER_LOG)
        for number in range(spec["rounds"]):
            for name in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
                watched.speed.pause()
                measured[name].append(rounds[name](STEPS))
        watched.close()
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"trackers": ", ".join(trackers) or "none", "keys_in_a_row": watched.keys_in_a_row, "peak_rss_mib": peak_rss_mib()}
    return found | {"measured": measured, "what": loop.what, "cpu_s_of_other_processes": round(others.ru_utime + others.ru_stime, 2)}


def small() -> Any:
    """The LlamaConfig of --quick: fast steps, of which watching is a larger part."""
    from model.config import LlamaConfig

    return LlamaConfig(seq_len=64, hidden_dim=64, intermediate_dim=128, num_layers=2, num_heads=2, num_kv_heads=2, vocab_size=2048)


def _read(_: int, metrics: dict[str, Any]) -> None:
    float(metrics["train/loss"])


def _fail(message: str) -> None:
    raise RuntimeError(message)


if __name__ == "__main__":
    sys.exit(main({"observation": run}, side))
