"""What a Llama model is: the shape, the positions, and the switches that do not change its maths.

    LlamaConfig(seq_len=2048, hidden_dim=2048, intermediate_dim=8192, num_heads=16, num_kv_heads=16, num_layers=24)

Field names are those of Levanter's LlamaConfig, so that experiment scripts port unchanged.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from model.config_base import Config, runtime

RematPolicy = Literal["none", "save_all", "save_qkv_attn", "save_attn", "full"]
REMAT_POLICIES: tuple[RematPolicy, ...] = get_args(RematPolicy)  # from the least work to the least memory
AttentionBackend = Literal["splash", "flash", "plain"]
QuantizedDtype = Literal["int8", "fp8"]


class RopeConfig(Config):
    """Rotary position embedding (Su et al. 2021) and how it stretches to longer contexts."""

    type: Literal["default", "linear", "llama3"] = Field(default="default", description="Frequency scaling rule.")
    theta: float = Field(default=10000.0, gt=0, description="Base of the geometric series of wavelengths (`rope_theta`).")
    factor: float = Field(default=1.0, ge=1, description="How many times longer the context became; `linear` and `llama3`.")
    low_freq_factor: float = Field(default=1.0, gt=0, description="`llama3`: wavelengths above original/this are divided by `factor`.")
    high_freq_factor: float = Field(default=4.0, gt=0, description="`llama3`: wavelengths below original/this stay as they are.")
    original_max_position_embeddings: int = Field(default=8192, ge=1, description="`llama3`: context length before stretching, in tokens.")

    @model_validator(mode="after")
    def _check(self) -> RopeConfig:
        if self.type == "default" and self.factor != 1.0:
            raise ValueError(f"rope.factor={self.factor} has no effect with rope.type='default': set rope.type to 'linear' or 'llama3'")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope.high_freq_factor={self.high_freq_factor} must be larger than rope.low_freq_factor={self.low_freq_factor}"
            )
        return self


class LlamaConfig(Config):
    """Shape of a Llama (Touvron et al. 2023): pre-norm RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    seq_len: int = Field(default=2048, ge=2, description="Longest sequence the model is trained for, in tokens.")
    hidden_dim: int = Field(default=4096, ge=1, description="Width of the residual stream.")
    intermediate_dim: int = Field(default=11008, ge=1, description="Width of the SwiGLU feed-forward layer.")
    num_layers: int = Field(default=32, ge=1, description="Number of decoder layers.")
    num_heads: int = Field(default=32, ge=1, description="Query heads.")
    num_kv_heads: int = Field(default=32, ge=1, description="Key/value heads; fewer than `num_heads` means grouped-query attention.")
    head_dim: int | None = Field(default=None, ge=2, description="Width of one head; unset means hidden_dim / num_heads.")
    vocab_size: int | None = Field(default=None, ge=2, description="Rows of the embedding; unset means the tokenizer's vocabulary.")
    layer_norm_epsilon: float = Field(default=1e-5, gt=0, description="Epsilon of RMSNorm.")
    tie_word_embeddings: bool = Field(default=False, description="Use the embedding matrix as the output head too.")
    logit_soft_cap: float | None = Field(
        default=None, gt=0, description="Cap of the logits: cap * tanh(logits / cap) (Gemma 2). Hugging Face's Llama has none: no export."
    )
    pad_vocab_to_multiple_of: int = Field(
        default=1, ge=1, description="Embedding rows beyond the vocabulary, so that the mesh divides it; 128 suits every mesh."
    )
    initializer_range: float = Field(default=0.02, gt=0, description="Only written to the Hugging Face config.")
    rope: RopeConfig = Field(default=RopeConfig(), description="Rotary position embedding.")

    # Switches that change rounding at most, never the function that is learned.
    use_flash_attention: bool = runtime(True, description="Attention without the square of scores in memory; off means plain.")
    attn_backend: AttentionBackend | Literal["auto"] = runtime("auto", description="Which attention; auto chooses by device and length.")
    flash_attention_block_size: int | None = runtime(
        None, ge=128, multiple_of=128, description="Tokens in a block of splash or flash attention."
    )
    gradient_checkpointing: bool | RematPolicy = runtime(
        True, description="What the backward pass computes again: a policy's name, on (`full`) or off (`none`)."
    )
    scan_layers: bool = runtime(True, description="One compiled layer scanned over the stack; off unrolls it.")
    cross_entropy_block_size: int = runtime(1024, ge=1, description="Tokens per chunk of the fused head and loss, on each device.")

    @model_validator(mode="after")
    def _check(self) -> LlamaConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim={self.hidden_dim} is not a multiple of num_heads={self.num_heads}: change one or set head_dim")
        if self.head_size % 2:
            raise ValueError(f"the head width {self.head_size} is odd: rotary embedding rotates pairs, so make it even")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_dim // self.num_heads

    @property
    def remat(self) -> RematPolicy:
        """The policy that `gradient_checkpointing` names."""
        if isinstance(self.gradient_checkpointing, bool):
            return "full" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary, rounded up.

        Raises:
            ValueError: `vocab_size` is unset.
        """
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is unset: set it, or take it from the tokenizer with config.with_vocab(size)")
        return -(-self.vocab_size // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of

    def with_vocab(self, vocab_size: int) -> LlamaConfig:
        """This configuration with the tokenizer's vocabulary filled in where `vocab_size` was left open.

        Raises:
            ValueError: the tokenizer has more ids than the embedding has rows.
        """
        if self.vocab_size is None:
            return self.model_copy(update={"vocab_size": vocab_size})
        if vocab_size > self.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's vocabulary of {vocab_size}: "
                f"raise model.vocab_size to at least {vocab_size} or leave it unset"
            )
        return self
