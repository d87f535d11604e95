"""Runs that go on from another run's checkpoint: on another mixture, with a learning rate that falls from where it stood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, model_validator

from model.checkpoint_files import steps_in
from model.config import LlamaConfig
from model.config_base import Config
from model.optimizer_config import ScheduleName
from model.presets import MODELS
from model.train_config import SimpleTrainConfig
from tasks.config import RunConfig
from tasks.experiment_data import TokenizedDataset, as_mixture, with_default_validation
from tasks.mixture_config import Mixture
from tasks.pipeline import run_steps
from tasks.places import Place, place_of


class AnnealConfig(Config):
    """What `default_anneal` needs: where it goes on, on what, for how many tokens, and the learning rate that it falls from.

    The optimizer and its averages go on; the data begins with its first rows, as it is other data.
    """

    dataset_config: Mixture | TokenizedDataset
    initialize_from_checkpoint_path: str = Field(default=..., min_length=1, description="A run's directory, or one step's in it.")
    num_anneal_training_tokens: int = Field(default=50_000_000_000, ge=1, description="Tokens from the checkpoint to the end.")
    train_batch_size: int = Field(default=1024, ge=1, description="Sequences in one optimizer step.")
    learning_rate: float = Field(default=1e-4, gt=0, description="At the checkpoint.")
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1, description="The learning rate at the end, as a share of that at the checkpoint.")
    weight_decay: float = Field(default=0.05, ge=0, description="Decoupled weight decay.")
    lr_schedule: ScheduleName = Field(default="linear", description="Shape of the decay; linear alone can begin in its middle.")
    use_default_validation: bool | None = Field(default=None, description="Evaluate on Paloma too; unset: where all data is downloaded.")
    llama_config: LlamaConfig = Field(default=MODELS["8b"], description="The model that the checkpoint is of.")
    train: dict[str, Any] = Field(default={}, description="Further fields of SimpleTrainConfig, such as accelerator_type.")

    @model_validator(mode="after")
    def _check(self) -> AnnealConfig:
        if self.lr_schedule != "linear":
            raise ValueError(
                f"anneal.lr_schedule={self.lr_schedule!r}: the decay begins at the checkpoint, in the middle of a schedule over all steps, "
                "which is straight only where it is 'linear'; to begin a schedule anew, set initialize_weights_only in default_train"
            )
        return self


# What an anneal has from where it begins: the checkpoint, and the straight line of the learning rate that begins there.
OF_ITS_BEGINNING = (
    *("lr_schedule", "warmup", "decay", "cycles", "cycle_length", "rewarmup"),
    *("initialize_from_checkpoint_path", "initialize_from_hf", "initialize_weights_only", "reset_data_loader_on_init"),
)


def default_anneal(name: str, anneal_config: AnnealConfig) -> RunConfig:
    """Declares a run that continues a checkpoint: its steps go on from there, its learning rate falls from `learning_rate`.

    Raises:
        ValueError: the checkpoint's step cannot be told, because there is none.
    """
    return going_on(anneal_in_its_own_terms(name, anneal_config), anneal_config.initialize_from_checkpoint_path)


def anneal_in_its_own_terms(name: str, config: AnnealConfig) -> RunConfig:
    """The anneal by itself: `num_train_steps` are those from the checkpoint on, `learning_rate` is the one at the checkpoint."""
    seq_len = int(config.train.get("train_seq_len") or config.llama_config.seq_len)
    given = {
        "train_batch_size": config.train_batch_size,
        "num_train_steps": max(1, round(config.num_anneal_training_tokens / (config.train_batch_size * seq_len))),
        "learning_rate": config.learning_rate,
        "min_lr_ratio": config.min_lr_ratio,
        "weight_decay": config.weight_decay,
        "lr_schedule": config.lr_schedule,
        "warmup": 0.0,
        "initialize_from_checkpoint_path": config.initialize_from_checkpoint_path,
    }
    data = with_default_validation(as_mixture(config.dataset_config), config.use_default_validation)
    return RunConfig(name=name, model=config.llama_config, train=SimpleTrainConfig(**{**given, **config.train}), data=data)


def going_on(run: RunConfig, checkpoint: str) -> RunConfig:
    """A run in its own terms as it is trained: its steps and stages come after those of `checkpoint`, on one line over all steps.

    Raises:
        ValueError: the checkpoint's step cannot be told.
    """
    train = run.train
    begin = 0 if train.initialize_weights_only else checkpoint_step(checkpoint)
    total = begin + train.num_train_steps
    # A straight line that ends at min_lr_ratio * learning_rate and passes through learning_rate at the checkpoint begins here.
    end = train.min_lr_ratio * train.learning_rate
    peak = end + (train.learning_rate - end) * total / train.num_train_steps
    first, *later = train.batch_schedule.stages
    stages = (first, *(stage.model_copy(update={"start": begin + stage.start}) for stage in later))
    changed = {
        "num_train_steps": total,
        "train_batch_size": stages if later else train.train_batch_size,
        "learning_rate": peak,
        "min_lr_ratio": end / peak,
        "initialize_from_checkpoint_path": checkpoint,
    }
    return run.model_copy(update={"train": SimpleTrainConfig(**{**dict(train), **changed})})


def checkpoint_step(path: str) -> int:
    """The step of a checkpoint by the name of its directory (`4000`, `step-4000`), or the newest of a run's directory.

    Raises:
        ValueError: it is neither.
    """
    name = PurePosixPath(path).name.removeprefix("step-")
    if name.isdigit():
        return int(name)
    if not path.startswith("gs://") and (steps := steps_in(Path(path).expanduser() / "checkpoints")):
        return steps[0]
    raise ValueError(
        f"initialize_from_checkpoint_path={path!r} names no step and holds none: train that run first, or give RUN/checkpoints/STEP"
    )


@dataclass(frozen=True)
class ContinuedRun:
    """A run that goes on from what an experiment beside it trains: `base` runs first, and `run` begins with its last checkpoint.

    changed: what `AnnealConfig` is to be, `initialize_from_checkpoint_path` aside.
    """

    name: str
    base: RunConfig
    changed: dict[str, Any]

    def in_its_own_terms(self) -> RunConfig:
        """The run by itself, which flags change: its own steps, the learning rate where it begins."""
        placeholder = f"{self.base.name}/checkpoints/{self.base.train.num_train_steps}"
        return anneal_in_its_own_terms(self.name, AnnealConfig(**self.changed, initialize_from_checkpoint_path=placeholder))

    def begun(self, root: str | Place, run: RunConfig | None = None) -> RunConfig:
        """The run, with the checkpoint that `base` has or will have below `root`. `run`: it in its own terms, where flags changed it."""
        return going_on(run or self.in_its_own_terms(), str(last_checkpoint(self.base, root)))

    def is_ready(self, root: str | Place) -> bool:
        """Whether `base` is trained."""
        return run_steps(self.base).training.is_committed(root)


def last_checkpoint(run: RunConfig, root: str | Place) -> Place:
    """Where the last checkpoint of a run lies, or will lie, below `root`."""
    return run_steps(run).training.directory(place_of(root)) / "checkpoints" / str(run.train.num_train_steps)


def anneal_after(name: str, base: RunConfig, **anneal_config: Any) -> ContinuedRun:
    """Declares an anneal of a run that is declared in the same file. `executor_main` trains `base` first.

    anneal_config: the fields of `AnnealConfig`, `initialize_from_checkpoint_path` aside.

    Raises:
        ValueError: a field is refused.
    """
    changed = {"llama_config": base.model, **anneal_config}
    run = ContinuedRun(name, base, changed)
    run.in_its_own_terms()  # what is wrong is said here
    return run
