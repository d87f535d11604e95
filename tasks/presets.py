"""Named runs: `python flows/train.py PRESET`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from model.config_base import nearest
from model.presets import MODELS
from model.train_config import SimpleTrainConfig
from tasks.config import RunConfig
from tasks.datasets import shakespeare_mixture


class Preset(StrEnum):
    """The runs that ship with the project."""

    DEBUG = "debug"
    TINY = "tiny"


def _debug() -> RunConfig:
    train = SimpleTrainConfig(
        train_batch_size=8,
        num_train_steps=240,
        learning_rate=3e-3,
        weight_decay=0.1,
        warmup=0.1,
        z_loss_weight=1e-4,
        compute_dtype="float32",
        steps_per_eval=80,
        steps_per_export=40,
        max_checkpoints=1,
        steps_per_log=5,
        steps_per_sample=80,
        sample_prompts=("HAM.\nTo be, or not", "Enter the King", "Shall I compare thee"),
        sample_tokens=80,
    )
    return RunConfig(name="debug", model=MODELS["debug"], train=train, data=shakespeare_mixture())


def _tiny() -> RunConfig:
    train = SimpleTrainConfig(
        train_batch_size=16,
        num_train_steps=600,
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup=0.05,
        z_loss_weight=1e-4,
        compute_dtype="float32",
        steps_per_eval=100,
        steps_per_export=50,
        max_checkpoints=1,
        steps_per_sample=200,
        sample_prompts=("HAM.\nTo be, or not", "Enter the King", "Shall I compare thee"),
        sample_tokens=120,
    )
    return RunConfig(name="tiny", model=MODELS["tiny"], train=train, data=shakespeare_mixture())


_PRESETS: dict[Preset, Callable[[], RunConfig]] = {Preset.DEBUG: _debug, Preset.TINY: _tiny}


def preset(name: str) -> RunConfig:
    """The run of that name.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    names = [entry.value for entry in Preset]
    if name not in names:
        raise ValueError(f"unknown preset {name!r}{nearest(name, names)}; the presets are {', '.join(names)}")
    return _PRESETS[Preset(name)]()
