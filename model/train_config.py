"""How a model is trained. Field names are those of the guide's SimpleTrainConfig."""

from __future__ import annotations

from typing import Literal, TypedDict

from pydantic import Field, model_validator

from model.config import LlamaConfig, QuantizedDtype
from model.config_base import Config, runtime

NEWEST_CHECKPOINTS = 2  # kept whatever their steps are: if the last one is damaged, there is one before it


class MeshSizes(TypedDict):
    """Devices along the mesh axes that a run chooses."""

    data: int
    context: int
    tensor: int


class SimpleTrainConfig(Config):
    """One training run: batch, steps, optimizer, schedule, cadence."""

    train_batch_size: int = Field(ge=1, description="Sequences in one optimizer step, over all devices (global batch size).")
    num_train_steps: int = Field(ge=1, description="Optimizer steps.")
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    train_seq_len: int | None = Field(default=None, ge=2, description="Tokens in one training sequence; unset means model.seq_len.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the initial weights, and of the data order where data_seed is unset.")
    data_seed: int | None = Field(default=None, ge=0, lt=2**31, description="Seed of the data order.")

    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled decay of the Linear weights (not norms, not the embedding).")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW first-moment decay.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW second-moment decay.")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Clip the global gradient norm here; unset means never.")
    warmup: float = Field(default=0.01, ge=0, description="Linear warmup: above 1 a number of steps, up to 1 a fraction of all steps.")
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="The cosine ends at this fraction of the peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape after warmup.")
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
    compiler_options: dict[str, str] = runtime({}, description="XLA options by name; `python -m model.preflight` finds those that pay.")
    steps_per_eval: int = runtime(1000, ge=1, description="Evaluate on the held-out split every so many steps, and at the end.")
    max_eval_batches: int | None = Field(default=None, ge=1, description="Evaluate at most so many batches a component; unset means all.")
    steps_per_export: int = runtime(10_000, ge=1, description="Keep a checkpoint every so many steps, and the last one.")
    minutes_per_checkpoint: float | None = runtime(
        10.0, gt=0, description="Save this long after the last save too; of these the newest two stay. Unset: never by the clock."
    )
    max_checkpoints: int | None = runtime(None, ge=1, description="Of the checkpoints to keep, the newest so many; unset keeps all.")
    max_rollbacks: int = runtime(
        0, ge=0, description="How often a loss that is not finite takes the run back to its newest checkpoint, and over the data since."
    )
    steps_per_log: int = runtime(10, ge=1, description="Write metrics every so many steps.")
    steps_per_sample: int = runtime(1000, ge=1, description="Generate sample text every so many steps, and at the end.")
    sample_prompts: tuple[str, ...] = runtime(("The", "In the beginning", "Once upon a time"), description="Prompts of the samples.")
    sample_tokens: int = runtime(64, ge=1, description="Tokens generated after each prompt, or as many as model.seq_len has room for.")

    @model_validator(mode="after")
    def _check(self) -> SimpleTrainConfig:
        if self.per_device_parallelism == 0:
            raise ValueError("train.per_device_parallelism=0: give the sequences per device, or -1 for the whole batch at once")
        if self.warmup > 1 and self.warmup_steps > self.num_train_steps:
            raise ValueError(f"train.warmup={self.warmup:g} steps is more than train.num_train_steps={self.num_train_steps}")
        return self

    @property
    def warmup_steps(self) -> int:
        """Warmup in steps: `warmup` itself above 1, else that fraction of `num_train_steps`."""
        return round(self.warmup if self.warmup > 1 else self.warmup * self.num_train_steps)

    @property
    def checkpoints_kept(self) -> int:
        """The most checkpoints that lie on the disk at once, without the one being written."""
        stay = self.num_train_steps // self.steps_per_export
        return NEWEST_CHECKPOINTS + (stay if self.max_checkpoints is None else min(stay, self.max_checkpoints))

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
