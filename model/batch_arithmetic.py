"""How a global batch divides over devices and time. Arithmetic only, so a plan and the trainer give the same answer."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import LlamaConfig
from model.train_config import SimpleTrainConfig


@dataclass(frozen=True)
class BatchArithmetic:
    """`train_batch_size = per_device * num_microbatches * data * fsdp`; the devices of a context or tensor group see the same rows."""

    data: int
    fsdp: int
    context: int
    tensor: int
    per_device: int
    num_microbatches: int

    @classmethod
    def of(cls, train: SimpleTrainConfig, num_devices: int) -> BatchArithmetic:
        """The division on so many devices.

        Raises:
            ValueError: it does not come out even; names the field, its value and values that would do.
        """
        fixed = train.data_parallel_size * train.context_parallel_size * train.tensor_parallel_size
        if num_devices % fixed:
            raise ValueError(
                f"train.data_parallel_size={train.data_parallel_size} x train.context_parallel_size={train.context_parallel_size} "
                f"x train.tensor_parallel_size={train.tensor_parallel_size} does not divide the {num_devices} device(s): "
                f"their product must be a divisor of {num_devices}"
            )
        fsdp = num_devices // fixed
        ways, batch = train.data_parallel_size * fsdp, train.train_batch_size
        if batch % ways:
            raise ValueError(
                f"train.train_batch_size={batch} does not divide over {ways} devices (data {train.data_parallel_size} x fsdp {fsdp}): "
                f"use a multiple of {ways}, such as {max(ways, batch // ways * ways)}"
            )
        rows, at_once = batch // ways, train.per_device_parallelism
        if at_once != -1 and rows % at_once:
            raise ValueError(
                f"train.per_device_parallelism={at_once} does not divide the {rows} sequences that each of {ways} device(s) gets from "
                f"train.train_batch_size={batch}: use a divisor of {rows}, or -1 for all at once"
            )
        per_device = rows if at_once == -1 else at_once
        return cls(train.data_parallel_size, fsdp, train.context_parallel_size, train.tensor_parallel_size, per_device, rows // per_device)

    def __str__(self) -> str:
        return (
            f"{self.per_device * self.num_microbatches * self.data * self.fsdp} sequences = {self.per_device} a device x "
            f"{self.num_microbatches} microbatch(es) x data {self.data} x fsdp {self.fsdp}"
        )


def check_tensor_split(config: LlamaConfig, tensor: int) -> None:
    """Refuses a model whose heads, mlp or vocabulary do not divide over the `tensor` mesh axis.

    Raises:
        ValueError: naming the field, its value and the mesh axis.
    """
    sizes = {field: getattr(config, field) for field in ("num_heads", "num_kv_heads", "intermediate_dim")}
    if config.vocab_size is not None:
        sizes["vocab_size"] = config.padded_vocab_size
    for field, size in sizes.items():
        if size % tensor:
            remedy = "set model.pad_vocab_to_multiple_of=128" if field == "vocab_size" else f"change model.{field}"
            raise ValueError(
                f"model.{field}={size} is not a multiple of the mesh axis tensor={tensor}: {remedy} or change train.tensor_parallel_size"
            )
