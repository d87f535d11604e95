"""Arguments of the guide's SimpleTrainConfig that are said in another way here: taken over, or refused with what to write instead.

A script that is ported by changing its import lines passes them under their own names and with their own `None`s.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from model.config_base import Config

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
    "optimizer_config": ((None,), "set train.optimizer and its own fields (train.muon, train.lion, ...), or those of AdamW"),
    "watch": ((None,), "set train.watch_norms: norms of all parameters and gradients are logged every train.steps_per_log steps"),
    "explicit_mesh_axes": ((False, None), "leave it out: the mesh is set by train.data_parallel_size, context_ and tensor_parallel_size"),
    "pad_tokenizer_to_match_model": (
        (False, None),
        "leave it out: model.vocab_size may be larger than the tokenizer's vocabulary, and the export says so to transformers",
    ),
    "steps_per_task_eval": (
        (None,),
        "leave it out, and give default_train eval_harness=EvalHarnessConfig(tasks=..., steps=...)",
    ),
}


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
    resources = values.pop("resources", None)
    if resources is not None:
        if not isinstance(resources, ResourceConfig):
            raise ValueError(f"train.resources={resources!r}: give ResourceConfig.with_tpu('v4-128', slice_count=1), or accelerator_type")
        _say_once(values, "accelerator_type", resources.tpu_type, "resources")
        _say_once(values, "slice_count", resources.slice_count, "resources")
    return values


def _say_once(values: dict[str, Any], field: str, value: Any, said: str) -> None:
    if values.get(field, value) not in (value, None):
        raise ValueError(f"train.{said} and train.{field}={values[field]!r} contradict each other: leave one out")
    values[field] = value
