"""Declaring runs: `default_train` in an experiment's file, presets with changes on the command line and in the Prefect form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from model.config import LlamaConfig
from model.trackers import TrackerName
from model.train_config import SimpleTrainConfig
from tasks.config import EvalHarnessConfig, ExportConfig, RunConfig
from tasks.experiment_data import TokenizedDataset, as_mixture, with_default_validation
from tasks.mixture_config import Mixture, SimulatedEpoching
from tasks.places import Place, place_of
from tasks.presets import preset as preset_run
from tasks.tokenize_config import TokenizeConfig

T = TypeVar("T")

TRAIN_SCALARS = ("num_train_steps", "train_batch_size", "learning_rate", "seed")


def default_train(
    name: str,
    tokenized: Mixture | TokenizedDataset,
    model_config: LlamaConfig,
    train_config: SimpleTrainConfig,
    tags: Sequence[str] = (),
    use_default_validation: bool | None = None,
    eval_harness_tasks: Sequence[str] = (),
    track: Sequence[TrackerName] = (),
    eval_harness: EvalHarnessConfig | None = None,
) -> RunConfig:
    """Declares one run. Nothing is downloaded, tokenized or trained until `executor_main` is given it.

    Args:
        tokenized: a mixture, or one dataset with its tokenizer (`default_tokenize`).
        use_default_validation: evaluate on the sets of Paloma too. None: where all that is trained on has to be downloaded too.
        train_config: its `steps_per_task_eval`, where set, becomes `eval_harness.steps`.
        eval_harness_tasks: tasks of lm-eval for checkpoints, beside the run (`core`, or names such as `piqa:10`).
        track: trackers besides metrics.jsonl.
        eval_harness: the same with all its settings.

    Raises:
        ValueError: two parts of the configuration contradict each other.
    """
    for field, value in (("tags", tags), ("eval_harness_tasks", eval_harness_tasks), ("track", track)):
        if isinstance(value, str):
            raise ValueError(f"{field}={value!r} is one text where a list is meant: write [{value!r}]")
    if eval_harness_tasks and eval_harness is not None:
        raise ValueError(f"eval_harness_tasks={list(eval_harness_tasks)!r} and eval_harness say the same: leave one out")
    harness = eval_harness or EvalHarnessConfig(tasks=tuple(eval_harness_tasks))
    if (every := train_config.steps_per_task_eval) is not None:
        if harness.steps != every and "steps" in harness.model_fields_set:
            raise ValueError(
                f"train.steps_per_task_eval={every} and eval_harness.steps={harness.steps} contradict each other: leave one out"
            )
        harness = harness.model_copy(update={"steps": every})
        train_config = train_config.model_copy(update={"steps_per_task_eval": None})
    return RunConfig(
        name=name,
        model=model_config,
        train=train_config,
        data=with_default_validation(as_mixture(tokenized), use_default_validation),
        tags=tuple(tags),
        track=tuple(track),
        eval_harness=harness,
    )


def simulated_epoching_train(
    name: str,
    tokenized: Mixture | TokenizedDataset,
    model_config: LlamaConfig,
    train_config: SimpleTrainConfig,
    target_budget: int,
    tags: Sequence[str] = (),
    use_default_validation: bool | None = None,
    eval_harness_tasks: Sequence[str] = (),
) -> RunConfig:
    """As `default_train`, with each dataset cut so that this run repeats it as often as one of `target_budget` tokens would.

    Raises:
        ValueError: the target is shorter than this run, or as `default_train`.
    """
    mixture = as_mixture(tokenized)
    tokens = train_config.num_train_rows * train_config.seq_len_for(model_config)
    if tokens > target_budget:
        raise ValueError(f"target_budget={target_budget} is below the {tokens} tokens of this run, which stands for a longer one: raise it")
    simulated = mixture.model_copy(update={"simulated_epoching": SimulatedEpoching(experiment_tokens=tokens, target_tokens=target_budget)})
    return default_train(name, simulated, model_config, train_config, tags, use_default_validation, eval_harness_tasks)


def versioned(value: T) -> T:
    """`value` itself. In the guide it says that a value is part of a step's identity, which everything is here."""
    return value


def resolve_run(
    preset: str,
    *,
    name: str | None = None,
    model: LlamaConfig | None = None,
    train: SimpleTrainConfig | None = None,
    data: Mixture | None = None,
    tokenize: TokenizeConfig | None = None,
    export: ExportConfig | None = None,
    eval_harness: EvalHarnessConfig | None = None,
    track: Sequence[TrackerName] | None = None,
    tags: Sequence[str] | None = None,
    pool: str | None = None,
    **scalars: Any,
) -> RunConfig:
    """A preset with whole parts replaced where given, then single training fields (`TRAIN_SCALARS`) where given.

    Raises:
        ValueError: unknown preset, or values that contradict each other.
    """
    base = preset_run(preset)
    changed = {key: value for key, value in scalars.items() if value is not None}
    chosen = train or base.train
    return RunConfig(
        name=name or base.name,
        model=model or base.model,
        train=SimpleTrainConfig(**{**dict(chosen), **changed}),
        data=data or base.data,
        tokenize=tokenize or base.tokenize,
        export=export or base.export,
        eval_harness=eval_harness or base.eval_harness,
        track=base.track if track is None else tuple(track),
        tags=base.tags if tags is None else tuple(tags),
        pool=pool or base.pool,
    )


def root_place(root: str | None) -> Place:
    """Where artifacts lie, on this machine or in a bucket: `root`, else the environment's PREFECT_LLAMA_ROOT, else ./artifacts.

    Raises:
        ValueError: a URL of a storage that is not built in, or one that names no bucket.
    """
    chosen = root or os.environ.get("PREFECT_LLAMA_ROOT") or "artifacts"
    try:
        place = place_of(chosen)
    except ValueError as error:
        raise ValueError(f"--root={chosen}: {error}") from None
    return place.expanduser().absolute() if isinstance(place, Path) else place


def root_directory(root: str | None) -> Path:
    """`root_place`, for what needs a directory of this machine.

    Raises:
        ValueError: it is in a bucket, or no place that is known.
    """
    place = root_place(root)
    if not isinstance(place, Path):
        raise ValueError(f"--root={place}: this works in a directory only; give a path")
    return place
