"""What a chip can do, and how many FLOPs a model needs: peak tables, parameter and FLOP counts, MFU. No JAX here, so a plan can use it.

Two conventions for MFU (model FLOPs utilisation) are in use and differ by the attention term only:
    causal           a causal mask needs half of the attention square (MaxText since 2025); this project's `mfu`
    full attention   the whole square is counted (PaLM's appendix B, Levanter, older MaxText); `mfu_full_attention`
Under a sliding window both count the band of the square that is inside the window: W columns of S, causal less the corner above them.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.attention_backend import attention_block_size, attention_window, computed_share
from model.config import AttentionBackend, LlamaConfig, RematPolicy

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published and measured limits of one chip; all rates are per chip, dense, and peaks no program reaches."""

    name: str  # Cloud TPU generation: "v4", "v5e", "v5p", "v6e"
    device_kinds: tuple[str, ...]  # what `jax.Device.device_kind` says on it
    bf16_flops: float  # FLOP/s
    int8_flops: float  # operations/s
    usable_hbm_bytes: int  # what the compiler refuses to exceed, less than the chip's nominal capacity
    hbm_bytes_per_second: float
    ici_links: int  # links to neighbouring chips: 2 per torus dimension
    ici_link_bytes_per_second: float  # of one link in one direction
    dcn_bytes_per_second: float  # the chip's share of its host's data-center network, one direction
    source: str

    @property
    def ici_bytes_per_second(self) -> float:
        """What all links of the chip send together, in bytes/s."""
        return self.ici_links * self.ici_link_bytes_per_second


# FLOP/s and HBM: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (HBM of v4 and v6e to the digit: libtpu's own tables). ICI and DCN:
# "How to Scale Your Model", part 2 (jax-ml.github.io/scaling-book/tpus), which puts a link a tenth below its nominal rate.
# Usable HBM: the capacity libtpu 0.0.42 names when it refuses a program.
_SOURCE = "cloud.google.com/tpu/docs/{}; jax-ml.github.io/scaling-book/tpus; libtpu 0.0.42 (usable HBM)"
CHIPS: dict[str, Chip] = {
    "v4": Chip("v4", ("TPU v4",), 275e12, 275e12, int(30.75 * GIB), 1.228e12, 6, 45e9, 6.25e9, _SOURCE.format("v4")),
    "v5e": Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 394e12, int(15.75 * GIB), 0.819e12, 4, 45e9, 3.125e9, _SOURCE.format("v5e")),
    "v5p": Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 918e12, int(95.74 * GIB), 2.765e12, 6, 90e9, 6.25e9, _SOURCE.format("v5p")),
    "v6e": Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1836e12, int(31.25 * GIB), 1.64e12, 4, 90e9, 12.5e9, _SOURCE.format("v6e")),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that calls itself `device_kind` (`jax.Device.device_kind`), None for anything but these TPUs."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def num_parameters(config: LlamaConfig) -> int:
    """Weights of the model, embedding and head included. `config.vocab_size` must be set."""
    width, heads = config.hidden_dim, config.num_heads + config.num_kv_heads
    matrices = 2 * width * heads * config.head_size + 3 * width * config.intermediate_dim
    tables = _vocab_size(config) * width * (1 if config.tie_word_embeddings else 2)
    layer_norms = 2 * width * (2 if config.hybrid_norm else 1) + (2 * config.head_size if config.qk_norm else 0)
    norms = config.num_layers * layer_norms + width * (2 if config.input_embedding_norm else 1)
    return config.num_layers * (matrices + _biases(config)) + tables + (norms if config.use_layer_norm_weight else 0)


def _biases(config: LlamaConfig) -> int:
    """Those of one layer."""
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_size if config.attention_bias else 0
    output = config.hidden_dim if config.attention_bias is True else 0
    return qkv + output + (2 * config.intermediate_dim + config.hidden_dim if config.mlp_bias else 0)


def train_flops_per_token(config: LlamaConfig, seq_len: int, *, full_attention: bool = False) -> float:
    """Model FLOPs to train on one token: three times the forward matmuls (PaLM, appendix B).

    Attention is counted at half the square, as a causal mask needs, unless `full_attention` (Levanter's convention). A sliding
    window of W of S tokens leaves W/S - (W/S)^2 / 2 of the square, and W/S by the other convention.
    The embedding lookup is no matmul and counts nothing; recomputation is not model work.
    """
    layer = _LayerFlops.of(config, seq_len)
    band = (attention_window(config, seq_len) or seq_len) / seq_len
    attention = layer.attention * (band if full_attention else band - band**2 / 2)
    head = 2.0 * config.hidden_dim * _vocab_size(config)  # tied weights are multiplied all the same
    return 3.0 * (config.num_layers * (layer.linear + attention) + head)


def executed_flops_per_token(
    config: LlamaConfig,
    seq_len: int,
    *,
    remat: RematPolicy,
    attention: AttentionBackend,
    context: int = 1,
    block_size: int | None = None,
) -> float:
    """Matmul FLOPs a chip really runs to train on one token: model work, recomputation and what the kernels waste.

    remat: which activations of a layer are kept; what is not kept and is needed again is computed twice. The down
        projection never is: nothing in the backward pass reads its output. `save_all` keeps q, k, v, the attention's
        output, gate and up, so it repeats the output projection alone.
    attention: "plain" runs the whole square, forward two matmuls and backward four, and repeats the scores wherever a policy
        drops them. "splash" skips blocks above the diagonal and before the window but runs whole blocks on their borders; its dq
        and dkv kernels each recompute the scores: seven backward matmuls. "flash" skips the same blocks and does both in one pass:
        five (FlashAttention-2, Dao 2023).
    context: chips that one sequence is split over, of which the busiest is counted (`computed_share`). Under splash they share
        the work; the other forms are not split along the sequence: every chip does all of it.
    block_size: tokens in a block of splash or flash, a divisor of a chip's; None: those that the model takes.

    The head's gradient is made in the forward pass: three matmuls, with the vocabulary's padding. Element-wise work, norms, the
    embedding and the optimizer are no matmuls and count nothing: below 1 % at real widths.
    """
    layer = _LayerFlops.of(config, seq_len)
    block, window = block_size or attention_block_size(config, attention, seq_len // context, context), attention_window(config, seq_len)
    if attention == "splash":
        square = layer.attention * computed_share(seq_len, block, context, window)
    else:
        square = layer.attention * context * (1.0 if attention == "plain" else computed_share(seq_len, block, window=window))
    backward = {"plain": 2.0, "flash": 2.5, "splash": 3.5}[attention]  # in units of the two forward matmuls
    repeated = {
        "none": 0.0,
        "save_all": layer.output,
        "save_qkv_attn": layer.output + layer.gate_up,
        "save_attn": layer.output + layer.gate_up + layer.qkv,
        "full": layer.output + layer.gate_up + layer.qkv,
    }[remat]
    if remat == "full":
        repeated += square
    elif remat != "none" and attention == "plain":
        repeated += square / 2  # the probabilities carry no name to be saved by
    per_layer = 3 * layer.linear + repeated + square * (1 + backward)
    head = 2.0 * config.hidden_dim * config.padded_vocab_size
    return config.num_layers * per_layer + 3 * head


def mfu(model_flops_per_second: float, chip: Chip, num_chips: int = 1) -> float:
    """Share of the chips' bf16 peak that `model_flops_per_second` (of all of them together) is, 0 to 1.

    The convention is that of the FLOPs passed in: `train_flops_per_token` causal, or with `full_attention`.
    """
    return model_flops_per_second / (chip.bf16_flops * num_chips)


@dataclass(frozen=True)
class _LayerFlops:
    """Forward matmul FLOPs of one layer for one token, by matrix."""

    qkv: float
    output: float
    gate_up: float
    down: float
    attention: float  # scores and values over the whole square

    @property
    def linear(self) -> float:
        """All products with weights."""
        return self.qkv + self.output + self.gate_up + self.down

    @staticmethod
    def of(config: LlamaConfig, seq_len: int) -> _LayerFlops:
        """Those of a model on sequences of `seq_len` tokens."""
        width, head = config.hidden_dim, config.head_size
        return _LayerFlops(
            qkv=2.0 * width * (config.num_heads + 2 * config.num_kv_heads) * head,
            output=2.0 * width * config.num_heads * head,
            gate_up=4.0 * width * config.intermediate_dim,
            down=2.0 * width * config.intermediate_dim,
            attention=4.0 * seq_len * config.num_heads * head,
        )


def _vocab_size(config: LlamaConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is unset: fill it in from the tokenizer with LlamaConfig.with_vocab")
    return config.vocab_size
