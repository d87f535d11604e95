"""How a model is trained. Field names are those of the guide's SimpleTrainConfig."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from model.batch_schedule import BatchSchedule, BatchSize
from model.config import LONGEST, LlamaConfig, QuantizedDtype
from model.config_base import Config, nearest, runtime
from model.cycles import cycles_of
from model.guide_fields import taken_over
from model.optimizer_config import (
    AdafactorConfig,
    LionConfig,
    MuonConfig,
    OptimizerName,
    OutlierWindow,
    ScheduleName,
    SophiaConfig,
    check_effects,
)
from model.secret_text import is_secret_name

NEWEST_CHECKPOINTS = 2  # kept whatever their steps are: if the last one is damaged, there is one before it


class MeshSizes(TypedDict):
    """Devices along the mesh axes that a run chooses."""

    data: int
    context: int
    tensor: int


def check_beginning(train: SimpleTrainConfig) -> None:
    """Refuses settings of where a run begins that contradict each other, or have no effect. Raises ValueError."""
    checkpoint, hf = train.initialize_from_checkpoint_path, train.initialize_from_hf
    if checkpoint is not None and hf is not None:
        raise ValueError(
            f"train.initialize_from_checkpoint_path={checkpoint!r} and train.initialize_from_hf={hf!r} contradict each other: leave one out"
        )
    if checkpoint is None:
        for field, default in (("initialize_weights_only", False), ("reset_data_loader_on_init", True)):
            if getattr(train, field) != default:
                raise ValueError(
                    f"train.{field} has no effect without train.initialize_from_checkpoint_path: set that too, or leave it out"
                )
        if train.allow_partial_checkpoint and hf is None:
            raise ValueError("train.allow_partial_checkpoint has no effect where weights begin fresh: leave it out")


def check_hf_exports(train: SimpleTrainConfig) -> None:
    """Refuses exports of steps whose checkpoints would not be there. Raises ValueError with the remedy."""
    every = train.steps_per_hf_export
    if every == 0:
        raise ValueError("train.steps_per_hf_export=0: give a number of steps, or -1 for the last checkpoint alone")
    if every is None or every < 0 or every >= train.num_train_steps:
        return
    if every % train.steps_per_export:
        raise ValueError(
            f"train.steps_per_hf_export={every} is no multiple of train.steps_per_export={train.steps_per_export}, so there would be no "
            "checkpoint to export: make it one"
        )
    if train.max_checkpoints is not None:
        raise ValueError(
            f"train.max_checkpoints={train.max_checkpoints} may remove checkpoints before they are exported every "
            f"train.steps_per_hf_export={every}: leave it out, or set train.steps_per_hf_export=-1"
        )


class SimpleTrainConfig(Config):
    """One training run: batch, steps, optimizer, schedule, cadence."""

    train_batch_size: BatchSize = Field(
        description="Sequences in one optimizer step, over all devices (global batch size); or stages of the run with a size each."
    )
    num_train_steps: int = Field(ge=1, description="Optimizer steps.")
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    train_seq_len: int | None = Field(
        default=None, ge=2, le=LONGEST, description="Tokens in one training sequence; unset means model.seq_len."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the initial weights, and of the data order where data_seed is unset.")
    data_seed: int | None = Field(default=None, ge=0, lt=2**31, description="Seed of the data order.")

    optimizer: OptimizerName = Field(default="adamw", description="How gradients become updates.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled decay of the Linear weights (not norms, not the embedding).")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW first-moment decay.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW second-moment decay.")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    nesterov: bool = Field(default=False, description="AdamW with Nesterov's momentum (Dozat 2016).")
    muon: MuonConfig = Field(default=MuonConfig(), description="Settings of the optimizer muon.")
    lion: LionConfig = Field(default=LionConfig(), description="Settings of the optimizer lion.")
    adafactor: AdafactorConfig = Field(default=AdafactorConfig(), description="Settings of the optimizer adafactor.")
    sophia: SophiaConfig = Field(default=SophiaConfig(), description="Settings of the optimizer sophia.")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Clip the global gradient norm here; unset means never.")
    update_rms_clipping: float | None = Field(
        default=None, gt=0, description="Largest root mean square of a matrix's update, in learning rates; unset means any."
    )
    clip_update_norm: bool = Field(default=False, description="Shorten updates that are much longer than the latest ones.")
    update_norm_window: OutlierWindow = Field(default=OutlierWindow(sigma=3.0), description="What much longer is.")
    skip_bad_steps: bool = Field(
        default=False, description="Skip a step whose loss or gradient is not finite, or much larger than of late."
    )
    bad_step_window: OutlierWindow = Field(default=OutlierWindow(sigma=6.0), description="What much larger is.")
    ema_beta: float | None = Field(
        default=None, gt=0, lt=1, description="Decay of a moving average of the weights, which is evaluated and exported; unset: none."
    )

    lr_schedule: ScheduleName = Field(default="cosine", description="Shape of the decay. WSD is `linear` with a short `decay`.")
    warmup: float = Field(
        default=0.01, ge=0, description="Linear warmup: above 1 a number of steps, up to 1 a fraction of the first cycle."
    )
    decay: float | None = Field(
        default=None, gt=0, description="Steps, or up to 1 a fraction, of each cycle that decay; unset: all the rest."
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="The decay ends at this fraction of the peak learning rate.")
    cycle_length: float | tuple[int, ...] | None = Field(
        default=None,
        description="Steps of a cycle of warmup and decay, a fraction of the run up to 1, or the steps of each; unset: one cycle.",
    )
    cycles: int | None = Field(default=None, ge=1, description="Number of equally long cycles, instead of cycle_length.")
    rewarmup: float = Field(default=0.0, ge=0, description="Warmup of the cycles after the first: steps, or a fraction of the cycle.")

    initialize_from_checkpoint_path: str | None = runtime(
        None, description="Start from a checkpoint: a run's directory (its newest that verifies), or one step's in it."
    )
    initialize_from_hf: str | None = runtime(None, description="Start from the weights of a directory that transformers could load.")
    initialize_weights_only: bool = Field(
        default=False, description="Of the checkpoint take the weights alone: step, optimizer and averages begin anew."
    )
    reset_data_loader_on_init: bool = Field(
        default=True, description="Begin with the first rows of the data; off goes on where the checkpoint stood in it."
    )
    allow_partial_checkpoint: bool = Field(
        default=False, description="What the checkpoint lacks, or has in another shape, begins fresh and is listed; off refuses it."
    )

    z_loss_weight: float = Field(default=0.0, ge=0, description="Weight of logsumexp(logits)^2 (PaLM): keeps logits small.")
    compute_dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Arithmetic of the layers; weights stay float32.")
    quantized_matmul: QuantizedDtype | None = Field(
        default=None, description="Round both operands of the layers' products, weight gradients apart; needs `prefect-llama[quantized]`."
    )
    gradient_sum_dtype: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="In which the devices' gradients are summed; unset means compute_dtype. Over microbatches: float32."
    )

    accelerator_type: str | None = runtime(None, description="TPU slice name such as v4-128; unset means this machine's devices.")
    slice_count: int = runtime(1, ge=1, description="TPU slices, each with a replica of the weights; gradients cross between them.")
    data_parallel_size: int = runtime(1, ge=1, description="Devices on the `data` mesh axis (weights replicated over it).")
    context_parallel_size: int = runtime(1, ge=1, description="Devices on the `context` mesh axis (one sequence split over them).")
    tensor_parallel_size: int = runtime(1, ge=1, description="Devices on the `tensor` mesh axis (heads, mlp and vocabulary split).")
    per_device_parallelism: int = runtime(
        -1, ge=-1, description="Sequences per device at once; fewer than the batch needs means gradient accumulation. -1: all at once."
    )
    per_device_eval_parallelism: int = runtime(
        -1, ge=-1, description="Sequences per device at once in evaluation; -1: as many as in training."
    )
    env_vars: dict[str, str] = runtime({}, description="Environment of the training processes, for example LIBTPU_INIT_ARGS; no secrets.")
    compiler_options: dict[str, str] = runtime({}, description="XLA options by name; `python -m model.preflight` finds those that pay.")
    steps_per_eval: int = runtime(1000, ge=1, description="Evaluate on the held-out split every so many steps, and at the end.")
    steps_per_task_eval: int | None = runtime(
        None, ge=1, description="For default_train, which makes it eval_harness.steps: run tasks of lm-eval every so many steps."
    )
    max_eval_batches: int | None = Field(
        default=None, ge=1, description="Evaluate at most so many times the rows of a training batch, of each component; unset: all."
    )
    steps_per_export: int = runtime(10_000, ge=1, description="Keep a checkpoint every so many steps, and the last one.")
    minutes_per_checkpoint: float | None = runtime(
        10.0, gt=0, description="Save this long after the last save too; of these the newest two stay. Unset: never by the clock."
    )
    steps_per_hf_export: int | None = runtime(
        None,
        ge=-1,
        description="Make a Hugging Face directory of the checkpoint of every so many steps too, a multiple of steps_per_export; unset: as "
        "often as that, where all checkpoints stay. -1: of the last one alone.",
    )
    hf_generation_eos_token_ids: tuple[int, ...] | None = runtime(
        None, description="Ids that end a generated text, in the export's generation_config.json; unset: the tokenizer's EOS."
    )
    max_checkpoints: int | None = runtime(None, ge=1, description="Of the checkpoints to keep, the newest so many; unset keeps all.")
    max_rollbacks: int = runtime(
        0, ge=0, description="How often a loss that is not finite takes the run back to its newest checkpoint, and over the data since."
    )
    steps_per_log: int = runtime(10, ge=1, description="Write metrics every so many steps.")
    steps_per_sample: int = runtime(1000, ge=1, description="Generate sample text every so many steps, and at the end.")
    sample_prompts: tuple[str, ...] = runtime(("The", "In the beginning", "Once upon a time"), description="Prompts of the samples.")
    sample_tokens: int = runtime(64, ge=1, description="Tokens generated after each prompt, or as many as model.seq_len has room for.")

    watch_norms: bool = runtime(True, description="Log the norm of every parameter and gradient, a layer's own where layers are stacked.")
    watchdog_minutes: float | None = runtime(
        15.0, gt=0, description="End the process if a step takes longer, with all stacks in a file; compiling, evaluating: 4 times that."
    )
    profiler: bool = runtime(False, description="Trace some steps with jax.profiler, into `profile/` of the run's directory.")
    profiler_start_step: int = runtime(5, ge=1, description="Steps of this process before the trace: compiling is not traced.")
    profiler_num_steps: int = runtime(100, ge=1, description="Steps that are traced.")

    @model_validator(mode="before")
    @classmethod
    def _take_over(cls, data: Any) -> Any:
        return taken_over(data) if isinstance(data, dict) else data

    @field_validator("env_vars")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in filter(is_secret_name, value):
            raise ValueError(
                f"train.env_vars[{name!r}] looks like a secret, which would be kept with the run's parameters: set it in the environment "
                "of the process or the worker that trains"
            )
        return value

    @field_validator("optimizer", "lr_schedule", mode="before")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        known = list(get_args(cls.model_fields[str(info.field_name)].annotation))
        if value == "wsd" and info.field_name == "lr_schedule":
            raise ValueError("train.lr_schedule='wsd' is train.lr_schedule='linear' with train.decay below 1, such as 0.2: say it that way")
        if value not in known:
            raise ValueError(f"train.{info.field_name}={value!r} is unknown{nearest(str(value), known)}: use one of {', '.join(known)}")
        return value

    @field_validator("train_batch_size")
    @classmethod
    def _sizes(cls, value: BatchSize) -> BatchSize:
        return BatchSchedule.of(value).given

    @field_validator("cycle_length")
    @classmethod
    def _positive(cls, value: float | tuple[int, ...] | None) -> float | tuple[int, ...] | None:
        lengths = value if isinstance(value, tuple) else (1 if value is None else value,)
        if not lengths or min(lengths) <= 0:
            raise ValueError(f"train.cycle_length={value!r}: a cycle has at least one step")
        return value

    @model_validator(mode="after")
    def _check(self) -> SimpleTrainConfig:
        for field in ("per_device_parallelism", "per_device_eval_parallelism"):
            if getattr(self, field) == 0:
                raise ValueError(f"train.{field}=0: give the sequences per device, or -1 for the whole batch at once")
        check_effects(self)
        check_beginning(self)
        check_hf_exports(self)
        if (last := self.batch_schedule.stages[-1]).start >= self.num_train_steps:
            raise ValueError(
                f"train.train_batch_size has a stage that starts at step {last.start}, and train.num_train_steps={self.num_train_steps} "
                f"ends before it: leave that stage out, or train longer"
            )
        if len(cycles_of(self)) == 1 and self.rewarmup:
            raise ValueError(f"train.rewarmup={self.rewarmup:g} has no effect in a single cycle: set train.cycles, or leave it out")
        return self

    @property
    def batch_schedule(self) -> BatchSchedule:
        """`train_batch_size` by step."""
        return BatchSchedule.of(self.train_batch_size)

    @property
    def num_train_rows(self) -> int:
        """Sequences that all steps take together."""
        return self.batch_schedule.rows_before(self.num_train_steps)

    @property
    def warmup_steps(self) -> int:
        """Warmup of the first cycle in steps."""
        return cycles_of(self)[0].warmup

    @property
    def checkpoints_kept(self) -> int:
        """The most checkpoints that lie on the disk at once, without the one being written."""
        stay = self.num_train_steps // self.steps_per_export
        return NEWEST_CHECKPOINTS + (stay if self.max_checkpoints is None else min(stay, self.max_checkpoints))

    @property
    def hf_export_steps(self) -> range:
        """The steps whose checkpoints are exported beside the training; not the last one, which the export step takes."""
        every = self.steps_per_hf_export
        if every is None:
            every = self.steps_per_export if self.max_checkpoints is None else -1
        return range(0) if every < 0 else range(every, self.num_train_steps, every)

    @property
    def mesh_sizes(self) -> MeshSizes:
        """The sizes of the mesh that are chosen here, as `model.mesh.make_mesh` takes them; fsdp gets the other devices."""
        return {"data": self.data_parallel_size, "context": self.context_parallel_size, "tensor": self.tensor_parallel_size}

    def seq_len_for(self, model: LlamaConfig) -> int:
        """Tokens in one training sequence of `model`: `train_seq_len`, or all that the model takes."""
        return self.train_seq_len or model.seq_len

    @property
    def loader_seed(self) -> int:
        """The seed of the data order."""
        return self.seed if self.data_seed is None else self.data_seed
