"""Where a run begins that goes on from a checkpoint: its own first step and row, and what the weights have seen before. Without JAX.

origin_of(train)                    # Origin(step=12, row=0, tokens=3_072): 12 steps of 4 sequences of 64 were another run's
origin_of(train).own(train)         # the same training as if it began there: its own steps, rows, stages
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.batch_schedule import BatchSchedule, BatchSizeStep
from model.buckets import absolute, path_of
from model.train_config import SimpleTrainConfig


@dataclass(frozen=True)
class Origin:
    """Steps before `step` were another run's. `row`: the first one of this run's data. `tokens`: what the weights have seen before."""

    step: int = 0
    row: int = 0
    tokens: int = 0

    def rows_until(self, batch_sizes: BatchSchedule, step: int) -> int:
        """Sequences of the run's own steps before `step`."""
        return batch_sizes.rows_before(step) - batch_sizes.rows_before(min(self.step, step))

    def own(self, train: SimpleTrainConfig) -> SimpleTrainConfig:
        """The training by its own steps alone, for counting: they begin at 0, and what leads up to them is left out."""
        if not 0 < self.step < train.num_train_steps:
            return train
        schedule, steps = train.batch_schedule, train.num_train_steps - self.step
        first = BatchSizeStep(start=0, value=schedule.size_at(self.step))
        later = [stage.model_copy(update={"start": stage.start - self.step}) for stage in schedule.stages if stage.start > self.step]
        changed = {
            "num_train_steps": steps,
            "train_batch_size": (first, *later) if later else first.value,
            "warmup": 0.0,  # what it is no longer: shorter than the steps
            "decay": None,
            "initialize_from_checkpoint_path": None,
        }
        return train.model_copy(update=changed)


ANEW = Origin()


def origin_of(train: SimpleTrainConfig) -> Origin:
    """Where a training begins, by the record of the checkpoint that it names; by the checkpoint's name where that cannot be read."""
    if train.initialize_from_checkpoint_path is None or train.initialize_weights_only:
        return ANEW
    directory = absolute(path_of(train.initialize_from_checkpoint_path))
    try:
        progress = json.loads((directory / "progress" / "metadata").read_text())
        return _by_record(progress, train)
    except (OSError, ValueError, KeyError, TypeError):
        # the trainer says what is wrong with it; this only counts
        return Origin(int(directory.name) if directory.name.isdigit() else 0)


def after(train: SimpleTrainConfig, then: SimpleTrainConfig, seq_len: int) -> Origin:
    """Where `then` begins that goes on after all steps of `train`, sequences of `seq_len`, before that one is trained."""
    if then.initialize_weights_only:
        return ANEW
    rows = train.num_train_rows
    return Origin(train.num_train_steps, 0 if then.reset_data_loader_on_init else rows, rows * seq_len)


def _by_record(progress: Mapping[str, Any], train: SimpleTrainConfig) -> Origin:
    step, data = int(progress["step"]), progress["data"]
    if (tokens := progress.get("tokens")) is None:  # of a version that did not write it
        given = data["global_batch_size"]
        sizes = given if isinstance(given, int) else tuple(BatchSizeStep(**one) for one in given)
        tokens = BatchSchedule.of(sizes).rows_before(step) * int(data["seq_len"])
    return Origin(step, 0 if train.reset_data_loader_on_init else int(data["next_row"]), int(tokens))
