"""Arguments of the guide's SimpleTrainConfig that are said in another way here: taken over, or refused with what to write instead.

A script that is ported by changing its import lines passes them under their own names and with their own `None`s.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from model.config_base import Config
from model.optimizer_config import AdafactorConfig, LionConfig, MuonConfig, OptimizerName, SophiaConfig

# `None` in the guide means the optimizer's or the trainer's own default, which the fields here have at once.
_NONE_IS_THE_DEFAULT = (
    "weight_decay",
    "beta1",
    "beta2",
    "epsilon",
    "lr_schedule",
    "warmup",
    "rewarmup",
    "min_lr_ratio",
    "z_loss_weight",
    "steps_per_eval",
    "per_device_eval_parallelism",
    "env_vars",
)

# argument -> (the values that ask for nothing, what to do instead of any other)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "explicit_mesh_axes": ((False, None), "leave it out: the mesh is set by train.data_parallel_size, context_ and tensor_parallel_size"),
    "pad_tokenizer_to_match_model": (
        (False, None),
        "leave it out: model.vocab_size may be larger than the tokenizer's vocabulary, and the export says so to transformers",
    ),
}


# Each holds the settings of one optimizer; those that all share are fields of the training.
_OPTIMIZERS: dict[type[Config], OptimizerName] = {
    MuonConfig: "muon",
    LionConfig: "lion",
    AdafactorConfig: "adafactor",
    SophiaConfig: "sophia",
}


class WatchConfig(Config):
    """What is watched, as the guide's scripts say it; `train.watch_norms` is all of it that there is here."""

    watch_targets: tuple[str, ...] = Field(default=("grads", "params"), description="Of these trees; none turns it off.")
    include_norms: bool = Field(default=True, description="The norm of each whole tree.")
    include_per_parameter_norms: bool = Field(default=True, description="The norm of every parameter.")
    include_histograms: bool = Field(default=False, description="Histograms, which there are not.")
    split_scan_layers: bool = Field(default=True, description="A layer's own norms where layers are stacked, as always here.")
    interval: int = Field(default=10, ge=1, description="Every so many steps: train.steps_per_log, or a multiple.")

    @field_validator("watch_targets", mode="before")
    @classmethod
    def _by_comma(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class ResourceConfig(Config):
    """The TPU slices of a run, as the guide's scripts name them: `ResourceConfig.with_tpu("v4-128", slice_count=4)`."""

    tpu_type: str = Field(default=..., description="Name of the slice, such as v4-128.")
    slice_count: int = Field(default=1, ge=1, description="How many of them.")

    @classmethod
    def with_tpu(cls, tpu_type: str, *, slice_count: int = 1) -> ResourceConfig:
        """Slices of one type."""
        return cls(tpu_type=tpu_type, slice_count=slice_count)


TpuPodConfig = ResourceConfig  # its name in earlier scripts


def taken_over(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a training configuration with those of the guide in the fields that mean them here.

    Raises:
        ValueError: one has no meaning here, or says what another one says differently; with what to write.
    """
    values = {name: value for name, value in given.items() if not (value is None and name in _NONE_IS_THE_DEFAULT)}
    for name, (nothing, remedy) in _REFUSED.items():
        value = values.pop(name, None)
        if value is not None and value not in nothing:
            raise ValueError(f"train.{name}={value!r} is of no use here: {remedy}")
    if values.get("steps_per_export", 0) is None:  # the last checkpoint alone stays
        values["steps_per_export"] = values.get("num_train_steps")
    if values.pop("int8", None):
        _say_once(values, "quantized_matmul", "int8", "int8=True")
    _take_optimizer(values)
    _take_watch(values)
    resources = values.pop("resources", None)
    if resources is not None:
        if not isinstance(resources, ResourceConfig):
            raise ValueError(f"train.resources={resources!r}: give ResourceConfig.with_tpu('v4-128', slice_count=1), or accelerator_type")
        _say_once(values, "accelerator_type", resources.tpu_type, "resources")
        _say_once(values, "slice_count", resources.slice_count, "resources")
    return values


def _take_optimizer(values: dict[str, Any]) -> None:
    given = values.pop("optimizer_config", None)
    if given is None:
        return
    name = _OPTIMIZERS.get(type(given))
    if name is None:
        known = ", ".join(kind.__name__ for kind in _OPTIMIZERS)
        raise ValueError(
            f"train.optimizer_config={given!r} is no optimizer of this project: give one of {known} (model.optimizer_config), or leave it "
            "out and set the fields of AdamW (train.weight_decay, train.beta1, ...)"
        )
    _say_once(values, "optimizer", name, "optimizer_config")
    _say_once(values, name, given, "optimizer_config")


def _take_watch(values: dict[str, Any]) -> None:
    """Refuses what `watch_norms` does not log; what it logs besides is not asked for, and there."""
    given = values.pop("watch", None)
    if given is None:
        return
    watch = WatchConfig.model_validate(given)
    remedy = "leave it out: train.watch_norms logs norms of all parameters and gradients, a layer's own, every train.steps_per_log steps"
    if others := [name for name in watch.watch_targets if name not in ("grads", "params")]:
        raise ValueError(f"train.watch: {', '.join(others)} cannot be watched, only grads and params: {remedy}")
    for field, value in (("include_histograms", True), ("split_scan_layers", False)):
        if getattr(watch, field) is value:
            raise ValueError(f"train.watch: {field}={value} is of no use here: {remedy}")
    if watch.interval % values.get("steps_per_log", 10):
        raise ValueError(f"train.watch: interval={watch.interval} is no multiple of train.steps_per_log: set that to {watch.interval} too")
    asked = bool(watch.watch_targets) and (watch.include_norms or watch.include_per_parameter_norms)
    _say_once(values, "watch_norms", asked, "watch")


def _say_once(values: dict[str, Any], field: str, value: Any, said: str) -> None:
    if values.get(field, value) not in (value, None):
        raise ValueError(f"train.{said} and train.{field}={values[field]!r} contradict each other: leave one out")
    values[field] = value
