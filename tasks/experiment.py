"""Declaring runs: `default_train` in an experiment's file, presets with changes on the command line and in the Prefect form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.config import LlamaConfig
from model.trackers import TrackerName
from model.train_config import SimpleTrainConfig
from tasks.config import ExportConfig, RunConfig
from tasks.datasets import Mixture
from tasks.presets import preset as preset_run
from tasks.tokenize_config import TokenizeConfig

TRAIN_SCALARS = ("num_train_steps", "train_batch_size", "learning_rate", "seed")


def default_train(
    name: str,
    tokenized: Mixture,
    model_config: LlamaConfig,
    train_config: SimpleTrainConfig,
    tags: Sequence[str] = (),
    track: Sequence[TrackerName] = (),
) -> RunConfig:
    """Declares one run. Nothing is downloaded, tokenized or trained until `executor_main` is given it.

    Raises:
        ValueError: two parts of the configuration contradict each other.
    """
    return RunConfig(name=name, model=model_config, train=train_config, data=tokenized, tags=tuple(tags), track=tuple(track))


def resolve_run(
    preset: str,
    *,
    name: str | None = None,
    model: LlamaConfig | None = None,
    train: SimpleTrainConfig | None = None,
    data: Mixture | None = None,
    tokenize: TokenizeConfig | None = None,
    export: ExportConfig | None = None,
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
        track=base.track if track is None else tuple(track),
        tags=base.tags if tags is None else tuple(tags),
        pool=pool or base.pool,
    )


def root_directory(root: str | None) -> Path:
    """Where artifacts lie: `root`, else the environment's PREFECT_LLAMA_ROOT, else ./artifacts.

    Raises:
        ValueError: a URL of a storage that is not built in.
    """
    chosen = root or os.environ.get("PREFECT_LLAMA_ROOT") or "artifacts"
    if "://" in chosen and not chosen.startswith("file://"):
        raise ValueError(f"--root={chosen}: only local directories are supported; give a path")
    return Path(chosen.removeprefix("file://")).expanduser().absolute()
