"""train-llama: pretrain a Llama from raw text.

    python flows/train.py                                  the debug preset: a few minutes on a laptop, offline
    python flows/train.py tiny --train.num-train-steps 500 another preset, one thing changed
    python flows/train.py --plan                           what would run, be reused, and cost
    prefect deployment run train-llama/train-llama               the same run through a work pool

Raw text -> tokenizer -> tokens -> mixture -> checkpoints -> Hugging Face directory. Each arrow is one Prefect task whose
result is a directory with a manifest; a step whose configuration and inputs did not change is reused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python puts flows/ first on the path; the packages are siblings of it. The command line imports this file as a module
    # when there is something to run, so that --help and --plan wait for no Prefect.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from flows.command_line import run_command

    sys.exit(run_command(sys.argv[1:]))

from typing import TYPE_CHECKING, Any

from flows.declaration_errors import explain_declarations
from model.config import LlamaConfig, RopeConfig
from model.guide_fields import ResourceConfig, TpuPodConfig, WatchConfig
from model.train_config import SimpleTrainConfig
from tasks.anneal import AnnealConfig, ContinuedRun, anneal_after, default_anneal
from tasks.config import RunConfig
from tasks.experiment import default_train, simulated_epoching_train, versioned
from tasks.experiment_data import default_download, default_tokenize, interpolate_mixture_configs, lm_mixture_data_config
from tasks.mixture_config import Mixture

if TYPE_CHECKING:
    from flows.train_flow import TASKS, run_plan, submit, train_llama

explain_declarations()  # of the experiment's file that imports this

# What an experiment's file imports is here at once. The flow is loaded, and Prefect with it, when somebody asks for it.
_FLOW = ("TASKS", "run_plan", "submit", "train_llama")

__all__ = [
    "TASKS",
    "AnnealConfig",
    "LlamaConfig",
    "Mixture",
    "ResourceConfig",
    "RopeConfig",
    "SimpleTrainConfig",
    "TpuPodConfig",
    "WatchConfig",
    "anneal_after",
    "default_anneal",
    "default_download",
    "default_tokenize",
    "default_train",
    "executor_main",
    "interpolate_mixture_configs",
    "lm_mixture_data_config",
    "main",
    "run_plan",
    "simulated_epoching_train",
    "submit",
    "train_llama",
    "versioned",
]


def __getattr__(name: str) -> Any:
    """The flow and its parts, on first use."""
    if name not in _FLOW:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flows import train_flow

    return getattr(train_flow, name)


def executor_main(steps: Sequence[RunConfig | ContinuedRun], description: str = "") -> None:
    """Runs experiments declared with `default_train`, with the flags of the command line, and exits with a status."""
    from flows.executor import run_experiments

    sys.exit(run_experiments(steps, description, sys.argv[1:]))


def main() -> None:
    """The installed command `train-llama`."""
    from flows.command_line import run_command

    sys.exit(run_command(sys.argv[1:]))
