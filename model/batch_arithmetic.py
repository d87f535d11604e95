"""How a global batch divides over devices and time. Arithmetic only, so a plan and the trainer give the same answer."""

from __future__ import annotations

from dataclasses import dataclass

from model.batch_schedule import BatchSchedule, BatchSizeStep
from model.config import LlamaConfig
from model.train_config import SimpleTrainConfig


@dataclass(frozen=True)
class BatchArithmetic:
    """`batch size = per_device * num_microbatches * data * fsdp`; the devices of a context or tensor group see the same rows.

    `train.per_device_parallelism` bounds the rows at once in every stage of a batch that changes, so the microbatches change with it.
    """

    data: int
    fsdp: int
    context: int
    tensor: int
    per_device: int
    num_microbatches: int

    @classmethod
    def of(cls, train: SimpleTrainConfig, num_devices: int) -> BatchArithmetic:
        """The division on so many devices, of the largest batch where the size changes; the others are checked.

        Raises:
            ValueError: it does not come out even; names the field, its value and values that would do.
        """
        return cls.by_size(train, num_devices)[train.batch_schedule.largest]

    @classmethod
    def by_size(cls, train: SimpleTrainConfig, num_devices: int) -> dict[int, BatchArithmetic]:
        """The division of every batch size of the run. Raises ValueError as `of` does."""
        ways, schedule = _ways(train, num_devices), train.batch_schedule
        return {stage.value: cls._of_stage(train, ways, schedule, stage) for stage in schedule.stages}

    @classmethod
    def _of_stage(cls, train: SimpleTrainConfig, ways: int, schedule: BatchSchedule, stage: BatchSizeStep) -> BatchArithmetic:
        batch, where, fsdp = stage.value, schedule.where(stage), ways // train.data_parallel_size
        if batch % ways:
            raise ValueError(
                f"train.train_batch_size={batch}{where} does not divide over {ways} devices (data {train.data_parallel_size} x fsdp "
                f"{fsdp}): use a multiple of {ways}, such as {max(ways, batch // ways * ways)}"
            )
        rows, at_once = batch // ways, train.per_device_parallelism
        if at_once == -1 or rows < at_once <= schedule.largest // ways:
            at_once = rows  # a small stage is done at once where a larger one is not
        if rows % at_once:
            raise ValueError(
                f"train.per_device_parallelism={at_once} does not divide the {rows} sequences that each of {ways} device(s) gets from "
                f"train.train_batch_size={batch}{where}: use a divisor of {rows}, or -1 for all at once"
            )
        return cls(train.data_parallel_size, fsdp, train.context_parallel_size, train.tensor_parallel_size, at_once, rows // at_once)

    @property
    def rows_at_once(self) -> int:
        """Sequences of one microbatch, over all devices."""
        return self.per_device * self.data * self.fsdp

    def eval_rows(self, train: SimpleTrainConfig) -> int:
        """Sequences of one batch of held-out text, over all devices: those of a microbatch, as what fits in training fits here too.

        `train.per_device_eval_parallelism` gives each group of devices that sees the same rows another number of them.
        """
        per_device = self.per_device if train.per_device_eval_parallelism == -1 else train.per_device_eval_parallelism
        return per_device * self.data * self.fsdp

    def __str__(self) -> str:
        return (
            f"{self.rows_at_once * self.num_microbatches} sequences = {self.per_device} a device x "
            f"{self.num_microbatches} microbatch(es) x data {self.data} x fsdp {self.fsdp}"
        )


def _ways(train: SimpleTrainConfig, num_devices: int) -> int:
    """Devices that see different rows."""
    fixed = train.data_parallel_size * train.context_parallel_size * train.tensor_parallel_size
    if num_devices % fixed:
        raise ValueError(
            f"train.data_parallel_size={train.data_parallel_size} x train.context_parallel_size={train.context_parallel_size} "
            f"x train.tensor_parallel_size={train.tensor_parallel_size} does not divide the {num_devices} device(s): "
            f"their product must be a divisor of {num_devices}"
        )
    return num_devices // fixed * train.data_parallel_size


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
