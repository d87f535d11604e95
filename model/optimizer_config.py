"""Settings that only some optimizers have, and which settings have an effect together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from model.config_base import Config

if TYPE_CHECKING:
    from model.train_config import SimpleTrainConfig

OptimizerName = Literal["adamw", "muon", "lion", "adafactor", "sophia"]
ScheduleName = Literal["cosine", "linear", "constant", "inv_sqrt", "inv"]


class MuonConfig(Config):
    """Muon (Jordan 2024) for the matrices of the layers; embedding, head and norms get Adam with `beta1`, `beta2`, `epsilon`."""

    momentum: float = Field(default=0.95, ge=0, lt=1, description="Decay of the average of gradients.")
    nesterov: bool = Field(default=True, description="Look ahead by one gradient.")
    ns_steps: int = Field(default=5, ge=1, description="Newton-Schulz iterations that make the average orthogonal.")
    consistent_rms: float | None = Field(
        default=0.2,
        gt=0,
        description="Updates have about this root mean square, as AdamW's (Liu et al. 2025); unset: sqrt(max(1, out/in)).",
    )
    adam_learning_rate_ratio: float = Field(
        default=1.0, gt=0, description="Learning rate of the weights that get Adam, over learning_rate."
    )


class LionConfig(Config):
    """Lion (Chen et al. 2023); wants a learning rate some 3 to 10 times smaller than AdamW's, and as much more weight decay."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Share of the average in the sign that is stepped along.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the average of gradients.")


class AdafactorConfig(Config):
    """Adafactor (Shazeer and Stern 2018), without scaling by the weights' own size: learning rates are like AdamW's."""

    decay_rate: float = Field(default=0.8, gt=0, description="Squared gradients are averaged with decay 1 - step^-decay_rate.")
    clipping_threshold: float | None = Field(default=1.0, gt=0, description="Largest root mean square of a matrix's update; unset: any.")
    min_dim_size_to_factor: int = Field(default=128, ge=1, description="Matrices narrower than this keep all their squared gradients.")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="Decay of an average of updates; unset saves its memory.")


class SophiaConfig(Config):
    """Sophia-G (Liu et al. 2023): curvature from the gradient on targets that the model samples itself."""

    beta1: float = Field(default=0.965, ge=0, lt=1, description="Decay of the average of gradients.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the average of curvatures.")
    epsilon: float = Field(default=1e-12, gt=0, description="Smallest divisor.")
    gamma: float = Field(default=0.05, gt=0, description="Factor on the curvature; the larger, the fewer weights are clipped.")
    clip_threshold: float = Field(default=1.0, gt=0, description="Largest step of one weight, in learning rates.")
    update_interval: int = Field(default=10, ge=1, description="Steps from one estimate of the curvature to the next.")


class OutlierWindow(Config):
    """When a number is an outlier among the latest ones: above their mean + `sigma` standard deviations."""

    length: int = Field(default=128, ge=2, description="Latest numbers that are looked at.")
    sigma: float = Field(gt=0, description="Standard deviations above the mean from which on a number is an outlier.")
    min_entries: int = Field(default=64, ge=2, description="With fewer numbers nothing is an outlier.")

    @model_validator(mode="after")
    def _check(self) -> OutlierWindow:
        if self.min_entries > self.length:
            raise ValueError(f"min_entries={self.min_entries} is more than length={self.length}, so nothing is an outlier: lower it")
        return self


# settings of some optimizers only: field -> optimizers that read it
_READ_BY: dict[str, tuple[OptimizerName, ...]] = {
    "beta1": ("adamw", "muon"),
    "beta2": ("adamw", "muon"),
    "epsilon": ("adamw", "muon"),
    "nesterov": ("adamw", "muon"),
    "muon": ("muon",),
    "lion": ("lion",),
    "adafactor": ("adafactor",),
    "sophia": ("sophia",),
}


def check_effects(train: SimpleTrainConfig) -> None:
    """Refuses settings that nothing reads.

    Raises:
        ValueError: names the field, its value and the remedy.
    """
    for field, optimizers in _READ_BY.items():
        if train.optimizer not in optimizers and _changed(train, field):
            own = f"train.{train.optimizer}" if train.optimizer not in ("adamw", "muon") else "the fields of AdamW"
            raise ValueError(
                f"train.{field}={getattr(train, field)} has no effect with train.optimizer={train.optimizer!r}: leave it out "
                f"({own} is where that optimizer is set), or use train.optimizer={optimizers[0]!r}"
            )
    for window, switch in (("bad_step_window", "skip_bad_steps"), ("update_norm_window", "clip_update_norm")):
        if _changed(train, window) and not getattr(train, switch):
            raise ValueError(f"train.{window}={getattr(train, window)} has no effect without train.{switch}: turn that on, or leave it out")
    if train.cycle_length is not None and train.cycles is not None:
        raise ValueError(f"train.cycle_length={train.cycle_length} and train.cycles={train.cycles} say the same: leave one out")
    if train.lr_schedule == "constant":
        for field in ("decay", "min_lr_ratio", "rewarmup", "cycle_length", "cycles"):
            if _changed(train, field):
                raise ValueError(
                    f"train.{field}={getattr(train, field)} has no effect with train.lr_schedule='constant', which never decays: "
                    "leave it out, or choose another schedule"
                )
    if train.lr_schedule == "inv" and train.min_lr_ratio == 0:
        raise ValueError("train.min_lr_ratio=0: train.lr_schedule='inv' never reaches 0, so give it a ratio above 0")


def _changed(train: SimpleTrainConfig, field: str) -> bool:
    return getattr(train, field) != type(train).model_fields[field].default
