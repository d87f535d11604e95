"""Named runs: `python flows/train.py PRESET`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from model.config_base import nearest
from model.presets import MODELS, SLICES, job_named
from model.train_config import SimpleTrainConfig
from tasks.catalogue import dclm_mixture_config_llama3
from tasks.config import RunConfig
from tasks.datasets import shakespeare_mixture


class Preset(StrEnum):
    """The runs that ship with the project."""

    DEBUG = "debug"
    TINY = "tiny"
    M15 = "15m"
    M75 = "75m"
    M150 = "150m"
    M300 = "300m"
    M600 = "600m"
    B1_4 = "1.4b"
    B1_9 = "1.9b"
    LLAMA_3_2_1B = "3.2-1b"
    B3_5 = "3.5b"
    B8 = "8b"
    B13 = "13b"
    B32 = "32b"
    B70 = "70b"
    DCLM_1B_1X = "dclm-1b-1x"
    DCLM_7B_1X = "dclm-7b-1x"


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
        steps_per_hf_export=-1,
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
        steps_per_hf_export=-1,
        max_checkpoints=1,
        steps_per_sample=200,
        sample_prompts=("HAM.\nTo be, or not", "Enter the King", "Shall I compare thee"),
        sample_tokens=120,
    )
    return RunConfig(name="tiny", model=MODELS["tiny"], train=train, data=shakespeare_mixture())


def _on_slices(name: str) -> RunConfig:
    """A job of `model.presets` on its slices, with the data of DataComp-LM and the tokenizer of Llama 3."""
    job = job_named(name)
    accelerator, count = SLICES[job.name]
    train = SimpleTrainConfig(**{**dict(job.train), "accelerator_type": accelerator, "slice_count": count})
    return RunConfig(name=name, model=MODELS[job.name], train=train, data=dclm_mixture_config_llama3)


_ON_THIS_MACHINE: dict[Preset, Callable[[], RunConfig]] = {Preset.DEBUG: _debug, Preset.TINY: _tiny}


def preset(name: str) -> RunConfig:
    """The run of that name.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    names = [entry.value for entry in Preset]
    if name not in names:
        raise ValueError(f"unknown preset {name!r}{nearest(name, names)}; the presets are {', '.join(names)}")
    made = _ON_THIS_MACHINE.get(Preset(name))
    return _on_slices(name) if made is None else made()
