"""What a Llama model is: the shape, the positions, and the switches that do not change its maths.

    LlamaConfig(seq_len=2048, hidden_dim=2048, intermediate_dim=8192, num_heads=16, num_kv_heads=16, num_layers=24)

Field names are those of Levanter's LlamaConfig, so that experiment scripts port unchanged, with two exceptions: `use_bias=True`
is `attention_bias=True, mlp_bias=True` here, the names of transformers; and there is no `upcast_attn`, because scores, softmax and
the sums of attention are float32 in every form of it, whatever the compute dtype.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from model.config_base import Config, runtime

RematPolicy = Literal["none", "save_all", "save_qkv_attn", "save_attn", "full"]
REMAT_POLICIES: tuple[RematPolicy, ...] = get_args(RematPolicy)  # from the least work to the least memory
AttentionBackend = Literal["splash", "flash", "plain"]
QuantizedDtype = Literal["int8", "fp8"]
Activation = Literal["silu", "gelu", "gelu_new", "quick_gelu", "relu", "tanh"]
Initializer = Literal["fan_in", "normal", "scaled_normal"]

LONGEST = 1 << 20  # tokens in a sequence: more is a slip of the pen


class RopeConfig(Config):
    """Rotary position embedding (Su et al. 2021) and how it stretches to longer contexts."""

    type: Literal["default", "linear", "llama3", "yarn"] = Field(default="default", description="Frequency scaling rule.")
    theta: float = Field(default=10000.0, gt=0, description="Base of the geometric series of wavelengths (`rope_theta`).")
    factor: float = Field(default=1.0, ge=1, description="How many times longer the context became; all but `default`.")
    low_freq_factor: float = Field(default=1.0, gt=0, description="`llama3`: wavelengths above original/this are divided by `factor`.")
    high_freq_factor: float = Field(default=4.0, gt=0, description="`llama3`: wavelengths below original/this stay as they are.")
    original_max_position_embeddings: int = Field(
        default=8192, ge=1, description="`llama3`, `yarn`: context length before stretching, in tokens."
    )
    beta_fast: float = Field(default=32.0, gt=0, description="`yarn`: waves that turn more often than this in the original context stay.")
    beta_slow: float = Field(default=1.0, gt=0, description="`yarn`: waves that turn less often than this are divided by `factor`.")
    truncate: bool = Field(default=True, description="`yarn`: the two borders between which it interpolates are whole dimensions.")
    attention_factor: float | None = Field(
        default=None, gt=0, description="`yarn`: factor of cosines and sines; unset means 0.1 ln(factor) + 1, or by `mscale`."
    )
    mscale: float | None = Field(
        default=None, gt=0, description="`yarn` with `mscale_all_dim`: the factor is (0.1 mscale ln(factor) + 1) over that of the other."
    )
    mscale_all_dim: float | None = Field(default=None, gt=0, description="`yarn` with `mscale`: what its factor is divided by.")

    @model_validator(mode="after")
    def _check(self) -> RopeConfig:
        if self.type == "default" and self.factor != 1.0:
            raise ValueError(
                f"rope.factor={self.factor} has no effect with rope.type='default': set rope.type to 'linear', 'llama3' or 'yarn'"
            )
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope.high_freq_factor={self.high_freq_factor} must be larger than rope.low_freq_factor={self.low_freq_factor}"
            )
        if self.type == "yarn" and self.theta <= 1:
            raise ValueError(f"rope.theta={self.theta} must be above 1 with rope.type='yarn'")
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(f"rope.beta_fast={self.beta_fast} must be larger than rope.beta_slow={self.beta_slow}")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"rope.mscale={self.mscale} and rope.mscale_all_dim={self.mscale_all_dim} have effect together only: set both, or neither "
                f"and rope.attention_factor"
            )
        return self


# Of Levanter's LlamaConfig: what its `None` leaves to a default, and what asks for nothing where it is false or `None`.
_NONE_IS_THE_DEFAULT = ("attn_backend", "cross_entropy_block_size")
_REFUSED = {
    "use_bias": "set model.attention_bias and model.mlp_bias",
    "upcast_attn": "leave it out: scores and softmax of attention are float32 always",
    "reference_checkpoint": "leave it out: an export has its own configuration, and initialize_from_hf names the weights to begin with",
    "tokenizer": "name it in the mixture, data.tokenizer",
}


class LlamaConfig(Config):
    """Shape of a Llama (Touvron et al. 2023): pre-norm RMSNorm, SwiGLU, RoPE, grouped-query attention; and its relatives.

    Mistral has `sliding_window`, Qwen 3 `qk_norm`, Qwen 2 `attention_bias="qkv"`. What a model has decides which architecture of
    transformers it is exported as; `model.hf_architectures` says which can say what.
    """

    seq_len: int = Field(default=2048, ge=2, le=LONGEST, description="Longest sequence the model is trained for, in tokens.")
    hidden_dim: int = Field(default=4096, ge=1, description="Width of the residual stream.")
    intermediate_dim: int = Field(default=11008, ge=1, description="Width of the gated feed-forward layer.")
    activation_function: Activation = Field(
        default="silu", description="Of the gate; silu makes it SwiGLU, gelu GEGLU. `gelu_new` is tanh's."
    )
    num_layers: int = Field(default=32, ge=1, description="Number of decoder layers.")
    num_heads: int = Field(default=32, ge=1, description="Query heads.")
    num_kv_heads: int = Field(default=32, ge=1, description="Key/value heads; fewer than `num_heads` means grouped-query attention.")
    head_dim: int | None = Field(default=None, ge=2, description="Width of one head; unset means hidden_dim / num_heads.")
    sliding_window: int | None = Field(
        default=None, ge=1, description="Latest tokens that a token attends to, itself among them, in every layer; unset means all."
    )
    qk_norm: bool = Field(default=False, description="RMSNorm of each head's queries and keys before rotation (Qwen 3).")
    attention_bias: bool | Literal["qkv"] = Field(
        default=False, description="Biases of q, k, v and the output projection; `qkv` leaves out the output (Qwen 2)."
    )
    mlp_bias: bool = Field(default=False, description="Biases of gate, up and down.")
    vocab_size: int | None = Field(default=None, ge=2, description="Rows of the embedding; unset means the tokenizer's vocabulary.")
    layer_norm_epsilon: float = Field(default=1e-5, gt=0, description="Epsilon of RMSNorm.")
    use_layer_norm_weight: bool = Field(default=True, description="RMSNorm has a weight; off, all norms only divide.")
    hybrid_norm: bool = Field(default=False, description="RMSNorm of what attention and feed-forward add, too. No export.")
    input_embedding_norm: bool = Field(default=False, description="RMSNorm of the embedded tokens. No export.")
    tie_word_embeddings: bool = Field(default=False, description="Use the embedding matrix as the output head too.")
    logit_soft_cap: float | None = Field(
        default=None, gt=0, description="Cap of the logits: cap * tanh(logits / cap) (Gemma 2). Hugging Face's Llama has none: no export."
    )
    pad_vocab_to_multiple_of: int = Field(
        default=1, ge=1, description="Embedding rows beyond the vocabulary, so that the mesh divides it; 128 suits every mesh."
    )
    initializer: Initializer = Field(
        default="fan_in",
        description="fan_in: truncated normal of 1/sqrt(fan_in). normal: of initializer_range. scaled_normal: and 1/sqrt(2 num_layers) "
        "of that where a layer adds to the residual stream.",
    )
    initializer_range: float = Field(
        default=0.02, gt=0, description="Standard deviation of normal and scaled_normal; written to the Hugging Face config."
    )
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

    @model_validator(mode="before")
    @classmethod
    def _take_over(cls, data: Any) -> Any:
        """Arguments of the guide's LlamaConfig that are said in another way here: taken, or refused with what to write instead."""
        if not isinstance(data, dict):
            return data
        values = {name: value for name, value in data.items() if value is not None or name not in _NONE_IS_THE_DEFAULT}
        if "max_seq_len" in values and "seq_len" not in values:
            values["seq_len"] = values.pop("max_seq_len")
        for name, remedy in _REFUSED.items():
            if value := values.pop(name, None):
                raise ValueError(f"model.{name}={value!r} is of no use here: {remedy}")
        return values

    @model_validator(mode="after")
    def _check(self) -> LlamaConfig:
        if not self.use_flash_attention and self.attn_backend not in ("auto", "plain"):
            raise ValueError(
                f"use_flash_attention=False means the plain form, and attn_backend={self.attn_backend!r} names another: leave one out"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: make it one")
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
