"""A whole run as one frozen tree: the model, how it is trained, on what, and how it is exported.

    RunConfig(name="mine", model=LlamaConfig(...), train=SimpleTrainConfig(...), data=Mixture(...))

Used three ways: in Python, as command-line flags, and as the form of a Prefect deployment.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from model.config import LlamaConfig
from model.config_base import Config, runtime
from model.trackers import TrackerName
from model.train_config import SimpleTrainConfig
from tasks.mixture_config import Mixture
from tasks.tokenize_config import TokenizeConfig


class ExportConfig(Config):
    """The Hugging Face directory made from the last checkpoint."""

    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Number format of the exported weights.")
    generation_eos_token_ids: tuple[int, ...] | None = Field(
        default=None, description="Ids that end a generated text; unset: train.hf_generation_eos_token_ids, else the tokenizer's EOS."
    )
    hub_repo_id: str | None = runtime(
        None,
        description="Push the finished directory to this repository of the Hugging Face hub, ORG/NAME, at the end; needs HF_TOKEN.",
    )

    @field_validator("hub_repo_id")
    @classmethod
    def _check_repository(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value):
            raise ValueError(f"export.hub_repo_id={value!r} is no repository of the hub: write ORG/NAME")
        return value


# The tasks that Marin evaluates base models by, with the examples each is asked after.
CORE_TASKS = (
    *("agieval_lsat_ar:3", "arc_easy:10", "arc_challenge:10", "boolq:10", "commonsense_qa:10", "copa:0", "hellaswag:0", "hellaswag:10"),
    *("lambada_openai:0", "openbookqa:0", "piqa:10", "wsc273:0", "winogrande:0"),
)


class EvalHarnessConfig(Config):
    """Tasks of lm-eval that checkpoints are evaluated by, beside the run. They change nothing of what is trained."""

    tasks: tuple[str, ...] = Field(
        default=(), description="Names, with the number of examples before each question where it matters (piqa:10); `core`: CORE_TASKS."
    )
    steps: int = Field(default=10_000, ge=1, description="Evaluate the checkpoint of every so many steps, and the last one.")
    limit: int | None = Field(default=None, ge=1, description="So many documents of each task at most; for trying out.")
    task_dir: Path | None = Field(default=None, description="A directory of task files (YAML) of your own.")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        tasks = tuple(dict.fromkeys(each for name in value for each in (CORE_TASKS if name == "core" else (name,))))
        for name in tasks:
            if not re.fullmatch(r"[^:\s]+(:\d{1,3})?", name):
                raise ValueError(f"eval_harness.tasks has {name!r}: write NAME or NAME:EXAMPLES, such as piqa:10")
        return tasks

    def by_num_fewshot(self) -> dict[int | None, tuple[str, ...]]:
        """The names of the tasks by the number of examples; None: as each task says itself."""
        groups: dict[int | None, tuple[str, ...]] = {}
        for name, _, shots in (task.partition(":") for task in self.tasks):
            number = int(shots) if shots else None
            groups[number] = (*groups.get(number, ()), name)
        return groups


INLINE = "inline"


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
    eval_harness: EvalHarnessConfig = runtime(EvalHarnessConfig(), description="Tasks of lm-eval for checkpoints, beside the run.")
    track: tuple[TrackerName, ...] = runtime((), description="Trackers besides metrics.jsonl; offline without an account.")
    tags: tuple[str, ...] = runtime((), description="Tags for the trackers.")
    pool: str | None = runtime(
        None, description="Work pool that trains, for example one of type `tpu`. Unset, or `inline`: this machine, in this run."
    )

    @field_validator("pool")
    @classmethod
    def _pool(cls, value: str | None) -> str | None:
        return None if value == INLINE else value  # which also takes back the pool that a preset or a deployment names

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.train.steps_per_task_eval is not None:
            raise ValueError(
                f"train.steps_per_task_eval={self.train.steps_per_task_eval} is read by default_train alone: set eval_harness.steps instead"
            )
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
