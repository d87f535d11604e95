"""What the processes that use a trained model are told: one JSON file that the parent writes and they read. Free of JAX."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from model.config_base import Config


class CompletionJob(Config):
    """Prompts to go on from, for `python -m model.completion`."""

    model: Path = Field(description="A run's directory, one of its checkpoints, or a Hugging Face directory.")
    prompts: tuple[str, ...] = Field(min_length=1, description="Each is continued on its own.")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Longest continuation; unset: 128, or what the context has room for."
    )
    temperature: float = Field(default=0.8, ge=0, allow_inf_nan=False, description="Divides the logits; 0 takes the likeliest token.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Sample from the likeliest tokens that hold this probability.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the sampling.")


class ChatJob(Config):
    """Conversations to hold, for `python -m model.chat`; what is said comes on its standard input."""

    model: Path = Field(description="A run's directory, one of its checkpoints, or a Hugging Face directory.")
    max_new_tokens: int | None = Field(default=None, ge=1, description="Longest answer; unset: 256, or what the context has room for.")
    temperature: float = Field(default=0.8, ge=0, allow_inf_nan=False, description="Divides the logits; 0 takes the likeliest token.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Sample from the likeliest tokens that hold this probability.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the sampling; each answer adds one.")


class HarnessJob(Config):
    """Tasks of lm-eval to run, for `python -m model.harness`."""

    model: Path = Field(description="A run's directory, one of its checkpoints, or a Hugging Face directory.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Names of tasks or groups, of lm-eval's own or of task_dir's.")
    task_dir: Path | None = Field(default=None, description="A directory of task files (YAML); relative paths in them begin here.")
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples before each question; unset: as each task says.")
    limit: int | None = Field(default=None, ge=1, description="So many documents of each task at most; for trying out.")
    batch_size: int = Field(default=8, ge=1, description="Rows of text at once.")
    score_bos: bool = Field(
        default=True,
        description="Rolling likelihoods begin with that of a second BOS, as lm-eval's Hugging Face backend has it; off: the text's alone.",
    )
