"""Memory and time of a step by arithmetic: what decides which compilations are worth their minute, and what advice says of slices
that were not compiled for. Never the answer itself where there is a compiled step.

Coefficients marked "fitted" are chosen against compiled steps of 2 and 7 billion parameters on v4, v5e, v5p and v6e. On these same
steps memory is 0.87 to 1.20 of the compiled, time on one slice 0.89 to 1.01. Of eleven steps of two and four layers on v4, v5e and v6e it
was 0.92 to 1.28, and up to 1/1.31 where another setting of the same job had corrected it: that is MEMORY_MARGIN, with some room.

Legend: D hidden width, F feed-forward width, H query and G key/value heads of width K, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.attention_backend import choose_backend
from model.config import LlamaConfig, RematPolicy
from model.flops import CHIPS, Chip, executed_flops_per_token, num_parameters, train_flops_per_token
from model.preflight.optimizer_cost import optimizer_cost
from model.preflight.settings import Job, Setting
from model.slices import Slice

_ICI_EXPOSED = {"v4": 0.15, "v5p": 0.15, "v5e": 0.6, "v6e": 0.6}  # fitted: a plane has no ring left to scatter gradients on
MEMORY_MARGIN = 1.4  # compiled over estimated memory at worst
_AVERAGES = {"adamw": 2, "muon": 2, "lion": 1, "adafactor": 0, "sophia": 2}  # float32 numbers that are kept beside a weight


@dataclass(frozen=True)
class Estimate:
    """One step on one chip: bytes and seconds."""

    hbm_bytes: float  # memory needed
    state_bytes: float  # of that, weights and moments, which are known and no estimate
    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    ici_exposed: float  # share of the collectives that the compiler leaves synchronous
    dcn_seconds: float
    model_flops: float
    executed_flops: float

    @property
    def working_bytes(self) -> float:
        """What is needed beside the state."""
        return self.hbm_bytes - self.state_bytes

    def corrected_bytes(self, factor: float) -> float:
        """Memory needed where the estimate of all but the state is off by `factor`."""
        return self.state_bytes + factor * self.working_bytes

    @property
    def step_seconds(self) -> float:
        """The slowest unit sets the time, and what does not hide of the collectives comes on top."""
        return max(self.compute_seconds, self.hbm_seconds, self.ici_seconds, self.dcn_seconds) + self.ici_exposed * self.ici_seconds

    @property
    def bound(self) -> str:
        """Which unit that is."""
        seconds = {"compute": self.compute_seconds, "hbm": self.hbm_seconds, "ici": self.ici_seconds, "dcn": self.dcn_seconds}
        return max(seconds, key=lambda unit: seconds[unit])


def estimate(job: Job, tpu_slice: Slice, setting: Setting) -> Estimate:
    """Of a job on its slices, run in this setting."""
    model, chip = job.model, CHIPS[tpu_slice.generation]
    num_chips = tpu_slice.num_chips * job.train.slice_count
    split = num_chips // setting.data  # chips that hold a weight between them, those of a sequence among them
    tokens = job.tokens_per_step / num_chips
    # A layer's products and their gradients in the activations; those in the weights and what is computed again are left out.
    int8 = 4 * model.num_layers * _layer_parameters(model) if job.train.quantized_matmul == "int8" else 0
    optimizer = optimizer_cost(model, job.train, split)
    gradients = 1 + optimizer.further_gradients
    products = gradients * (_executed(job, setting) - int8) * tokens + optimizer.flops
    return Estimate(
        hbm_bytes=_memory(job, setting, split, tokens / setting.microbatches),
        state_bytes=_state(job, split),
        compute_seconds=products / chip.bf16_flops + gradients * int8 * tokens / chip.int8_flops,
        hbm_seconds=gradients * _hbm_traffic(job, setting, split, tokens) / chip.hbm_bytes_per_second,
        ici_seconds=(gradients * _ici_traffic(job, setting, split) + optimizer.ici_bytes) / _ici_rate(chip, tpu_slice),
        ici_exposed=_ICI_EXPOSED[tpu_slice.generation],
        dcn_seconds=gradients * _dcn_traffic(job, split) / chip.dcn_bytes_per_second,
        model_flops=train_flops_per_token(model, job.seq_len) * tokens,
        executed_flops=gradients * _executed(job, setting) * tokens + optimizer.flops,
    )


def _executed(job: Job, setting: Setting) -> float:
    attention = choose_backend(job.model, job.seq_len, "tpu")
    return executed_flops_per_token(job.model, job.seq_len, remat=setting.remat, attention=attention, context=setting.context)


def kept_numbers(model: LlamaConfig, remat: RematPolicy) -> float:
    """Numbers of the compute dtype that one token leaves in one layer for the backward pass; `model.remat` has the table."""
    width, heads = model.hidden_dim, model.num_heads * model.head_size
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    kept = {
        "full": 0,
        "save_attn": heads,
        "save_qkv_attn": heads + qkv,
        "save_all": heads + qkv + 2 * model.intermediate_dim,
        "none": heads + qkv + 7 * model.intermediate_dim + 8 * width,  # fitted: float32 copies of norms, rotation and activation
    }
    return width + kept[remat]


def _numbers(model: LlamaConfig, remat: RematPolicy, tensor: int) -> float:
    """`kept_numbers` of a chip for each token that is its own. `tensor` chips share their tokens: heads and feed-forward are split
    between them, the residual stream is with each."""
    return kept_numbers(model, remat) + (tensor - 1) * model.hidden_dim


def _state(job: Job, split: int) -> float:
    """Bytes of weights, their averages and those of their gradients; the means that Adafactor keeps are too few to count."""
    train, model = job.train, job.model
    averages = _AVERAGES[train.optimizer] + (train.ema_beta is not None)
    averages += train.optimizer == "adafactor" and train.adafactor.momentum is not None
    saved = model.num_layers * _layer_parameters(model) if train.optimizer == "muon" else 0.0
    return 4 * ((1 + averages) * num_parameters(model) - saved) / split


def _memory(job: Job, setting: Setting, split: int, tokens_at_once: float) -> float:
    model, number, tensor = job.model, job.compute_bytes, setting.tensor
    gradients = (4 if setting.microbatches == 1 else 8) * num_parameters(model) / split
    stacks = 1.1 * model.num_layers * tokens_at_once * _numbers(model, setting.remat, tensor) * number  # fitted
    one_layer = tokens_at_once * _numbers(model, "none", tensor) * number
    if choose_backend(model, job.seq_len, "tpu") == "plain":
        one_layer += tokens_at_once * model.num_heads * job.seq_len * 8  # scores and their gradient
    gathered = 4 * number * _layer_parameters(model) / tensor  # this layer's, the next one's, and their gradients
    table = model.hidden_dim * model.padded_vocab_size / tensor
    chunk = min(model.cross_entropy_block_size, tokens_at_once * tensor) * model.padded_vocab_size / tensor
    head = table * (number + 4) + chunk * (number + 4)
    return _state(job, split) + gradients + stacks + one_layer + gathered + head


def _layer_parameters(model: LlamaConfig) -> float:
    heads = model.num_heads + model.num_kv_heads
    return 2 * model.hidden_dim * heads * model.head_size + 3 * model.hidden_dim * model.intermediate_dim


def _hbm_traffic(job: Job, setting: Setting, split: int, tokens: float) -> float:
    """Bytes: weights gathered and read in each pass, activations written and read, the optimizer."""
    model, number = job.model, job.compute_bytes
    parameters = num_parameters(model)
    weights = 12 * setting.microbatches * parameters / setting.tensor
    activations = 12 * number * tokens * model.num_layers * _numbers(model, "save_all", setting.tensor)  # fitted
    if setting.remat == "none":  # what is kept beyond that is written once and read once
        more = _numbers(model, "none", setting.tensor) - _numbers(model, "save_all", setting.tensor)
        activations += 2 * number * tokens * model.num_layers * more
    head = tokens / model.cross_entropy_block_size * model.hidden_dim * model.padded_vocab_size * 12
    update = 2 * _state(job, split) + 4 * parameters / split  # all of the state is read and written, the gradient read
    return weights + activations + head + update


def _ici_traffic(job: Job, setting: Setting, split: int) -> float:
    """Bytes one chip sends: weights gathered twice and gradients scattered once in every microbatch, activations over `tensor`."""
    model, number = job.model, job.compute_bytes
    if split == 1:
        return 0.0
    weights = 3 * number * setting.microbatches * num_parameters(model) / setting.tensor
    if setting.tensor == 1:
        return weights
    per_chip = job.tokens_per_step / (split * setting.data) * setting.tensor
    return weights + 8 * number * model.num_layers * per_chip * model.hidden_dim


def _dcn_traffic(job: Job, split: int) -> float:
    """Bytes one chip sends to other slices: its part of the gradients, all-reduced."""
    slices = job.train.slice_count
    return 2 * (slices - 1) / slices * job.compute_bytes * num_parameters(job.model) / split


def _ici_rate(chip: Chip, tpu_slice: Slice) -> float:
    """Bytes/s over all links; a dimension that is no ring has one link out of an end chip."""
    links = sum(0 if size == 1 else 2 if wrap else 1 for size, wrap in zip(tpu_slice.topology, tpu_slice.wrap, strict=True))
    return max(links, 1) * chip.ici_link_bytes_per_second
