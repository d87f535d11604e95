"""Parameter and FLOP counts, and what a device can do at best. Arithmetic only: no JAX, so a plan can use it."""

from __future__ import annotations

from model.config import LlamaConfig

# Peak dense bfloat16 FLOP/s of one chip, by `jax.Device.device_kind`; Google Cloud's TPU pages, 2026.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def num_parameters(config: LlamaConfig) -> int:
    """Weights of the model, embedding and head included. `config.vocab_size` must be set."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is unset: fill it in from the tokenizer with LlamaConfig.with_vocab")
    width, heads = config.hidden_dim, config.num_heads + config.num_kv_heads
    layer = 2 * width * heads * config.head_size + 3 * width * config.intermediate_dim + 2 * width
    tables = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return config.num_layers * layer + tables + width


def train_flops_per_token(config: LlamaConfig, seq_len: int, *, full_attention: bool = False) -> float:
    """Model FLOPs to train on one token: three times the forward matmuls (PaLM, appendix B).

    Attention is counted at half the square, as a causal mask needs, unless `full_attention` (Levanter's convention).
    The embedding lookup is no matmul and counts nothing; recomputation is not model work.
    """
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is unset: fill it in from the tokenizer with LlamaConfig.with_vocab")
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    linear = 2 * config.hidden_dim * (heads * config.head_size + 3 * config.intermediate_dim)
    attention = 4 * seq_len * config.num_heads * config.head_size * (1.0 if full_attention else 0.5)
    return 3.0 * (config.num_layers * (linear + attention) + 2 * config.hidden_dim * config.vocab_size)
