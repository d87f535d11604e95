"""What a run would do, before anything is started: which steps are reused and which run, and what the run amounts to.

Imports neither Prefect nor JAX, so `--plan` answers at once.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from model import hf_architectures
from model.batch_arithmetic import BatchArithmetic, check_tensor_split
from model.config import LlamaConfig
from model.flops import num_parameters, train_flops_per_token
from model.origin import Origin, origin_of
from model.slices import slice_named
from model.trackers import check_trackers
from model.train_config import SimpleTrainConfig
from tasks.artifacts import check_writable, read_manifest
from tasks.config import RunConfig, TrainingStep, beside_fields
from tasks.data_plan import PlannedComponent, bytes_to_fetch, planned_data, tokens_to_write
from tasks.data_steps import DataSteps
from tasks.datasets import check_sources
from tasks.disk_space import check_space, existing_place
from tasks.eval_harness import check_eval_harness
from tasks.pipeline import matching, run_steps
from tasks.places import Place, place_of
from tasks.steps import Step
from tasks.unlisted import depending, not_listed, unlisted_datasets
from tasks.vocabulary_file import not_exportable, vocabulary_size

# What a float32 training step of a small model reached on one core of a recent x86 server. Only the order of magnitude is
# meant: the progress bar knows better after two steps.
CPU_FLOPS_PER_CORE = 50e9
BYTES_PER_PARAMETER = 12  # float32 weights and two AdamW moments, as a checkpoint holds them


@dataclass(frozen=True)
class PlannedStep:
    """One step and what will happen to it."""

    step: Step
    action: Literal["reuse", "run", "leave"]
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run would do and what it amounts to."""

    config: RunConfig
    root: Place
    steps: tuple[PlannedStep, ...]
    model: LlamaConfig
    num_parameters: int
    total_tokens: int
    total_flops: float
    batch: BatchArithmetic | None  # None: how many devices there are is known only where the training runs
    seconds: float | None  # training time, where the devices are this machine's cores
    checkpoint_bytes: int
    components: tuple[PlannedComponent, ...]
    origin: Origin  # where it goes on from a checkpoint: tokens, FLOPs and time are those of its own steps
    fetch_bytes: int  # source files to copy or download
    token_bytes: int  # of tokens to make, by estimate
    warnings: tuple[str, ...]  # what may go wrong, by estimates or by what cannot be seen from here, a sentence each

    @property
    def forced(self) -> frozenset[str]:
        """Fingerprints of the steps to run although they are there."""
        return frozenset(p.step.fingerprint for p in self.steps if p.why == FORCED)

    @property
    def wanted(self) -> tuple[Step, ...]:
        """The steps that take part, inputs first."""
        return tuple(planned.step for planned in self.steps if planned.action != "leave")

    @property
    def own_train(self) -> SimpleTrainConfig:
        """The training by its own steps."""
        return self.origin.own(self.config.train)

    @property
    def has_training(self) -> bool:
        """Whether the training step takes part."""
        return any(step.kind == "checkpoints" for step in self.wanted)

    @property
    def trains(self) -> bool:
        """Whether the training step would run."""
        return trains(self.steps)


FORCED = "forced"


def trains(steps: Iterable[PlannedStep]) -> bool:
    """Whether the training step is among those that would run."""
    return any(planned.action == "run" and planned.step.kind == "checkpoints" for planned in steps)


def plan_run(
    config: RunConfig,
    root: str | Place,
    *,
    only: str | None = None,
    force: tuple[str, ...] = (),
    to_read: bool = False,
    origin: Origin | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        to_read: the plan is to be read, not run: a dataset whose server does not answer is planned from its declared size, and a disk
            that is too small is a warning.
        only: regular expression on `kind/name`; just the steps it finds, and what they need, take part.
        origin: where it will begin that goes on from a checkpoint which is not there yet.
        force: regular expressions on `kind/name`; the steps they find run although they are there.

    Raises:
        ValueError: something about the configuration, the sources or the place to write cannot work; says what to change.
    """
    root = place_of(root)
    unlisted = unlisted_datasets(config.data) if to_read else {}
    check_run(config, root, unlisted)
    run = run_steps(config, unlisted=unlisted)
    steps = run.all
    wanted = steps if only is None else _with_inputs(matching(steps, only, "--only"))
    forced = {step.fingerprint for pattern in force for step in matching(steps, pattern, "--force")}
    # What lies inside a directory that is emptied is made again too.
    forced |= {step.fingerprint for step in steps if step.subdirectory_of is not None and step.subdirectory_of.fingerprint in forced}
    unknown = depending(steps, unlisted)
    planned = tuple(_plan_step(step, root, step in wanted, step.fingerprint in forced, step in unknown) for step in steps)

    vocab_size = vocabulary_size(config.data.tokenizer)
    model = config.model.with_vocab(vocab_size)
    assert isinstance(run.training.config, TrainingStep)
    origin = origin or origin_of(run.training.config.train)
    total_tokens = origin.own(config.train).num_train_rows * config.seq_len
    total_flops = train_flops_per_token(model, config.seq_len) * total_tokens
    devices = None if config.train.accelerator_type else local_device_count()
    fetch_bytes, token_bytes = _data_bytes(config, run.data, root, wanted)
    kept_bytes = checkpoint_bytes(config, model) if trains(planned) and isinstance(root, Path) else 0
    space = check_space(root, kept_bytes, fetch_bytes, token_bytes, refuse=not to_read)
    data = planned_data(config, run.data, root, origin)
    return Plan(
        config=config,
        root=root,
        steps=planned,
        model=model,
        num_parameters=num_parameters(model),
        total_tokens=total_tokens,
        total_flops=total_flops,
        batch=None if devices is None else BatchArithmetic.of(config.train, devices),
        seconds=None if devices is None else total_flops / (CPU_FLOPS_PER_CORE * usable_cores()),
        checkpoint_bytes=checkpoint_bytes(config, model),
        components=data.components,
        origin=origin,
        fetch_bytes=fetch_bytes,
        token_bytes=token_bytes,
        warnings=(*_all_warmup(config), *not_listed(unlisted), *data.warnings, *space),
    )


def check_run(config: RunConfig, root: Place, unlisted: Collection[str] = ()) -> None:
    """Everything that can be known to fail before work starts; files of the `unlisted` datasets are not looked at.

    Raises:
        ValueError, OSError: naming the field or place, its value, and what to do.
    """
    check_sources(config.data, unlisted=unlisted)
    if (why := not_exportable(config.data.tokenizer) or hf_architectures.not_exportable(config.model)) is not None:
        raise ValueError(f"the model could not be exported: {why}")
    check_trackers(config.track)
    check_eval_harness(config)
    model = config.model.with_vocab(vocabulary_size(config.data.tokenizer))
    check_tensor_split(model, config.train.tensor_parallel_size)
    if config.train.accelerator_type is not None:
        slice_named(config.train.accelerator_type)
    elif config.train.slice_count > 1 and config.pool is None:
        raise ValueError(
            f"train.slice_count={config.train.slice_count} has no effect without train.accelerator_type: this machine would train "
            "alone. Give the slices' type too, such as train.accelerator_type='v4-128', or leave train.slice_count out"
        )
    elif (devices := local_device_count()) is not None:
        BatchArithmetic.of(config.train, devices)
    check_writable(existing_place(root) if isinstance(root, Path) else root)


def _all_warmup(config: RunConfig) -> list[str]:
    steps = config.train.num_train_steps
    if config.train.warmup != 1 or config.train.cycle_length is not None or config.train.cycles is not None:
        return []
    return [
        f"train.warmup=1 is a fraction: all {steps} steps warm up, and nothing decays; above 1 it is steps, below 1 a fraction "
        f"(one step is train.warmup={1 / steps:.2g})"
    ]


def checkpoint_bytes(config: RunConfig, model: LlamaConfig) -> int:
    """Disk that the kept checkpoints, one being written, and the exports need."""
    train = config.train
    return num_parameters(model) * (BYTES_PER_PARAMETER * (train.checkpoints_kept + 1) + 4 * (len(train.hf_export_steps) + 1))


def local_device_count() -> int | None:
    """JAX devices of this machine as far as can be told without JAX: CPU devices, or None where a TPU or GPU is attached."""
    if os.environ.get("JAX_PLATFORMS", "") != "cpu" and (
        glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or glob.glob("/dev/nvidia[0-9]*")
    ):
        return None
    match = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(match.group(1)) if match else 1


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan_step(step: Step, root: Place, wanted: bool, forced: bool, unknown: bool) -> PlannedStep:
    if not wanted:
        return PlannedStep(step, "leave", "not asked for")
    if unknown:
        return PlannedStep(step, "run", "run or reused: that is known when the files can be listed")
    if forced:
        return PlannedStep(step, "run", FORCED)
    why = step.explain_miss(root)
    if why:
        return PlannedStep(step, "run", why)
    place = str(step.directory(root))
    ignored = _not_applied(step, root)
    return PlannedStep(step, "reuse", f"{place}; not applied to it: {', '.join(ignored)}" if ignored else place)


def _not_applied(step: Step, root: Place) -> list[str]:
    """Fields that do not change the trained model, but what was written beside it, and differ from those it was made with."""
    config = step.config
    if not isinstance(config, TrainingStep) or (manifest := read_manifest(step.directory(root))) is None:
        return []
    made_with = manifest.stats.get("beside", {})
    return [f"train.{name}" for name, value in beside_fields(config.train).items() if made_with.get(name, value) != value]


def _data_bytes(config: RunConfig, data: DataSteps, root: Place, wanted: tuple[Step, ...]) -> tuple[int, int]:
    """Bytes of source files to fetch, and about those of tokens to write, of the steps that take part."""
    taken = replace(data, downloads=_among(data.downloads, wanted), tokens=_among(data.tokens, wanted))
    id_bytes = 2 if vocabulary_size(config.data.tokenizer) <= 1 << 16 else 4
    return bytes_to_fetch(taken, root), tokens_to_write(taken, root, config.data.tokenizer) * id_bytes


def _among(steps: tuple[Step, ...], wanted: tuple[Step, ...]) -> tuple[Step, ...]:
    return tuple(step for step in steps if step in wanted)


def _with_inputs(targets: tuple[Step, ...]) -> tuple[Step, ...]:
    needed: list[Step] = []
    for step in targets:
        needed += [*_with_inputs(step.upstream), step]
    return tuple(needed)
