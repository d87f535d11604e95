"""A whole run as one frozen tree: the model, how it is trained, on what, and how it is exported.

    RunConfig(name="mine", model=LlamaConfig(...), train=SimpleTrainConfig(...), data=Mixture(...))

Used three ways: in Python, as command-line flags, and as the form of a Prefect deployment.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from model.config import LlamaConfig
from model.config_base import Config, runtime
from model.trackers import TrackerName
from model.train_config import SimpleTrainConfig
from tasks.mixture_config import Mixture
from tasks.tokenize_config import TokenizeConfig


class ExportConfig(Config):
    """The Hugging Face directory made from the last checkpoint."""

    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Number format of the exported weights.")


class RunConfig(Config):
    """One run, complete. Two runs whose identity fields are equal are the same run."""

    name: str = runtime(
        ..., pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$", description="Name of the run: directories and trackers use it."
    )
    model: LlamaConfig
    train: SimpleTrainConfig
    data: Mixture
    tokenize: TokenizeConfig = runtime(TokenizeConfig(), description="Where and how wide tokenization runs.")
    export: ExportConfig = ExportConfig()
    track: tuple[TrackerName, ...] = runtime((), description="Trackers besides metrics.jsonl; offline without an account.")
    tags: tuple[str, ...] = runtime((), description="Tags for the trackers.")
    pool: str | None = runtime(None, description="Work pool that trains, for example one of type `tpu`. Unset: this machine, in this run.")

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.train.train_seq_len is not None and self.train.train_seq_len > self.model.seq_len:
            raise ValueError(
                f"train.train_seq_len={self.train.train_seq_len} is longer than model.seq_len={self.model.seq_len}: "
                "lower the first or raise the second"
            )
        return self

    @property
    def seq_len(self) -> int:
        """Tokens in one training sequence."""
        return self.train.seq_len_for(self.model)


class TrainingStep(Config):
    """What the training step is told, the mixture aside."""

    model: LlamaConfig
    train: SimpleTrainConfig
    initial_weights: str | None = Field(
        default=None, description="Digest of what it starts from; the paths in `train` are where that lies."
    )
    track: tuple[TrackerName, ...] = runtime(())
    tags: tuple[str, ...] = runtime(())
    eval_tags: dict[str, tuple[str, ...]] = runtime({}, description="The datasets' tags, by dataset name.")
    pool: str | None = runtime(None)


def beside_fields(train: SimpleTrainConfig) -> dict[str, Any]:
    """The fields that decide what is written beside the model (rows, evaluations, samples), as JSON values."""
    names = {"steps_per_log", "steps_per_eval", "steps_per_sample", "sample_prompts", "sample_tokens"}
    return train.model_dump(mode="json", include=names)
