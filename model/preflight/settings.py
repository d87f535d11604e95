"""What preflight may choose of a job: remat policy, microbatches, mesh. How a choice is applied, and which there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import model_validator

from model.attention_backend import SPLASH_MIN_BLOCK, attention_window, choose_backend
from model.batch_arithmetic import BatchArithmetic, check_tensor_split
from model.config import REMAT_POLICIES, LlamaConfig, RematPolicy
from model.config_base import Config
from model.slices import Slice
from model.train_config import SimpleTrainConfig


class Job(Config):
    """A model and how it is trained; `train.accelerator_type` and `train.slice_count` say on what."""

    name: str
    model: LlamaConfig
    train: SimpleTrainConfig

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.model.attn_backend == "flash" and self.model.use_flash_attention and attention_window(self.model, self.seq_len) is not None:
            raise ValueError(
                f"preflight cannot count the blocks of model.attn_backend='flash' with model.sliding_window={self.model.sliding_window}: "
                f"use model.attn_backend='auto', which is the kernel on a TPU"
            )
        return self

    @property
    def seq_len(self) -> int:
        """Tokens in one training sequence."""
        return self.train.seq_len_for(self.model)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch, of the largest where it changes."""
        return self.batch_size * self.seq_len

    @property
    def batch_size(self) -> int:
        """Sequences of the global batch, of the largest where it changes: what has to fit."""
        return self.train.batch_schedule.largest

    @property
    def hours_per_step_second(self) -> float:
        """Hours of the whole run for each second that a step of the largest batch takes.

        Smaller batches count by their sequences, and none takes less: traffic of weights does not shrink with the batch.
        """
        return self.train.num_train_rows / self.batch_size / 3600

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.train.compute_dtype == "bfloat16" else 4

    @property
    def data(self) -> int:
        """Copies of the weights: at least one a slice."""
        return max(self.train.data_parallel_size, self.train.slice_count)

    def with_batch(self, train_batch_size: int) -> Job:
        """The same job with another global batch."""
        return replace_train(self, train_batch_size=train_batch_size)


@dataclass(frozen=True)
class Setting:
    """One way to run a job on so many chips."""

    remat: RematPolicy
    microbatches: int
    data: int
    context: int
    tensor: int

    def applied(self, job: Job, num_chips: int) -> Job:
        """The job with this setting written into its configuration.

        Raises:
            ValueError: batch, heads or vocabulary do not divide over the chips this way.
        """
        check_tensor_split(job.model, self.tensor)
        whole = _split(job, self.data, self.context, self.tensor)
        rows = BatchArithmetic.of(whole.train, num_chips).per_device
        if rows % self.microbatches:
            raise ValueError(
                f"--microbatches={self.microbatches} does not divide the {rows} sequences of each device: use one of "
                f"{', '.join(map(str, divisors(rows)))}"
            )
        model = job.model.model_copy(update={"gradient_checkpointing": self.remat})
        divided = replace_train(whole, per_device_parallelism=rows // self.microbatches)
        BatchArithmetic.of(divided.train, num_chips)  # refuses what does not divide a smaller batch of the run
        return divided.model_copy(update={"model": model})

    def __str__(self) -> str:
        """For people."""
        mesh = "".join(f", {name} {size}" for name, size in (("context", self.context), ("tensor", self.tensor)) if size > 1)
        return f"remat {self.remat}, {self.microbatches} microbatch{'es' if self.microbatches > 1 else ''}{mesh}"


@dataclass(frozen=True)
class Fixed:
    """What the job or the command line decided already; None is preflight's to choose."""

    remat: RematPolicy | None = None
    microbatches: int | None = None

    @classmethod
    def of(cls, job: Job, num_chips: int, *, remat: RematPolicy | None = None, microbatches: int | None = None) -> Fixed:
        """What is given here, else what the job's configuration names: a policy by its name, sequences per device by a number.

        Raises:
            ValueError: the batch does not divide over the chips, or there are no microbatches.
        """
        if microbatches is not None and microbatches < 1:
            raise ValueError(f"--microbatches={microbatches}: the batch is computed in 1 part or more; leave it away to have it searched")
        named = job.model.gradient_checkpointing
        if remat is None and named is not True:
            remat = job.model.remat
        if microbatches is None and job.train.per_device_parallelism != -1:
            microbatches = BatchArithmetic.of(job.train, num_chips).num_microbatches
        return cls(remat, microbatches)


def settings_of(job: Job, tpu_slice: Slice, fixed: Fixed) -> list[Setting]:
    """Every setting that divides evenly. `fsdp` takes all chips of a slice; `data` the slices; `context`, and where sequences are too
    short for it `tensor`, what a batch smaller than the chips leaves, or more where a single sequence is too much for a chip.

    Raises:
        ValueError: none does; names the field, its value and values that would do.
    """
    data = job.data
    if data % job.train.slice_count:
        raise ValueError(
            f"train.data_parallel_size={data} is not a multiple of train.slice_count={job.train.slice_count}: weights are replicated "
            f"over slices, use {job.train.slice_count}"
        )
    num_chips = tpu_slice.num_chips * job.train.slice_count
    found: list[Setting] = []
    refused: ValueError | None = None
    for context, tensor in _splits(job, num_chips // data):
        try:
            check_tensor_split(job.model, tensor)
            rows = BatchArithmetic.of(_split(job, data, context, tensor).train, num_chips).per_device
        except ValueError as error:
            refused = refused or error
            continue
        for microbatches in (
            _microbatches(job, rows, num_chips // (context * tensor)) if fixed.microbatches is None else [fixed.microbatches]
        ):
            policies = REMAT_POLICIES if fixed.remat is None else (fixed.remat,)
            same_batch = [Setting(remat, microbatches, data, context, tensor) for remat in policies]
            same_batch[0].applied(job, num_chips)  # refuses microbatches that do not divide
            found += same_batch
    if not found:
        assert refused is not None
        raise refused
    return found


def _microbatches(job: Job, rows: int, ways: int) -> list[int]:
    """Those that divide the `rows` of a device, and leave so many at once that smaller batches of the run divide into them too."""
    smaller = [stage.value // ways for stage in job.train.batch_schedule.stages]
    return [count for count in divisors(rows) if all(few < rows // count or few % (rows // count) == 0 for few in smaller)]


def _splits(job: Job, chips: int) -> Iterator[tuple[int, int]]:
    """`(context, tensor)` to try, the plainest first."""
    context, tensor = job.train.context_parallel_size, job.train.tensor_parallel_size
    yield context, tensor
    if context > 1 or tensor > 1:  # said by the job
        return
    size = 2
    while size <= chips:
        yield (size, 1) if _sequence_splits(job, size) else (1, size)
        size *= 2


def _sequence_splits(job: Job, context: int) -> bool:
    """Whether each of `context` chips can have two pieces of a sequence that the attention kernel takes, and that are worth its while."""
    whole, rest = divmod(job.seq_len, 2 * context)
    aligned = whole % SPLASH_MIN_BLOCK == 0 or choose_backend(job.model, job.seq_len, "tpu") != "splash"
    return rest == 0 and whole >= SPLASH_MIN_BLOCK and aligned


def _split(job: Job, data: int, context: int, tensor: int) -> Job:
    """The job on this mesh, its batch at once."""
    return replace_train(
        job, data_parallel_size=data, context_parallel_size=context, tensor_parallel_size=tensor, per_device_parallelism=-1
    )


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def replace_train(job: Job, **fields: object) -> Job:
    """The job with fields of its training changed and checked."""
    return job.model_copy(update={"train": SimpleTrainConfig(**{**dict(job.train), **fields})})


def on_slice(job: Job, name: str, num_slices: int = 1) -> Job:
    """The job on other chips; what it says of its `data` axis belongs to the old ones."""
    return replace_train(job, accelerator_type=name, slice_count=num_slices, data_parallel_size=1)


def single_setting(job: Job, fixed: Fixed) -> Setting:
    """The one setting of a job whose open choices are not searched: the configuration's own remat policy, the batch at once."""
    return Setting(
        remat=fixed.remat or job.model.remat,
        microbatches=fixed.microbatches or 1,
        data=job.data,
        context=job.train.context_parallel_size,
        tensor=job.train.tensor_parallel_size,
    )
