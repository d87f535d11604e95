"""What the training process is told: one JSON file that the task writes and `python -m model.training_process` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from model.buckets import path_of
from model.config import LlamaConfig
from model.config_base import Config
from model.trackers import TrackerName
from model.train_config import SimpleTrainConfig


class TrainingJob(Config):
    """One training run. Where it writes is decided by its fingerprint, so running the same job again continues it."""

    name: str = Field(description="Name of the run.")
    fingerprint: str = Field(description="Identity of the run: 64 hex digits.")
    directory: Path = Field(description="The checkpoint artifact's directory on this machine.")
    bucket: str | None = Field(default=None, description="gs://... of the artifact, where it lies in a bucket: its checkpoints go there.")
    mixture: Path = Field(description="Directory of the mixture artifact on this machine.")
    mixture_bucket: str | None = Field(default=None, description="gs://... of the mixture, where it lies in a bucket: hosts fetch it.")
    model: LlamaConfig
    train: SimpleTrainConfig
    track: tuple[TrackerName, ...] = ()
    tags: tuple[str, ...] = ()
    eval_tags: dict[str, tuple[str, ...]] = Field(default={}, description="Tags of the mixture's datasets, by name; see model.evaluation.")

    @property
    def shared(self) -> Path:
        """Where every host of the run sees the same files, checkpoints among them: the bucket, or the directory."""
        return self.directory if self.bucket is None else path_of(self.bucket)

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.shared / "checkpoints"

    def identity_fields(self) -> dict[str, dict[str, Any]]:
        """The fields of the configuration that decide the result, for people who compare two runs."""
        return {"model": self.model.identity(), "train": self.train.identity()}
