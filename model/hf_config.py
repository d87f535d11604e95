"""`LlamaConfig` to and from the config.json of Hugging Face transformers, 4.x and 5.x.

transformers 4 reads `rope_theta` and `rope_scaling`, 5 reads `rope_parameters`: all three are written, either is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from model.config import LlamaConfig, RopeConfig

ARCHITECTURE = "LlamaForCausalLM"

# Ours -> theirs, for the fields that are carried over as they are.
_FIELDS = {
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
# What transformers assumes for keys that a config.json may leave out.
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class SpecialIds(NamedTuple):
    """Ids of the tokenizer's special tokens; None where it has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def not_exportable(config: LlamaConfig) -> str | None:
    """Why no config.json can describe a model, with the remedy, or None where one can."""
    if config.logit_soft_cap is None:
        return None
    return (
        f"model.logit_soft_cap={config.logit_soft_cap:g} has no place in a Hugging Face {ARCHITECTURE}, which would give other "
        f"logits: leave it unset (train.z_loss_weight keeps logits small too)"
    )


def to_hf(config: LlamaConfig, *, dtype: str, special: SpecialIds) -> dict[str, Any]:
    """The content of config.json; `dtype` is that of the weights beside it.

    Raises:
        ValueError: the model has what a Hugging Face Llama has not.
    """
    if (why := not_exportable(config)) is not None:
        raise ValueError(why)
    rope = _rope_to_hf(config.rope)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.type == "default" else rope,
        "rope_parameters": {"rope_theta": config.rope.theta, **rope},
        # Written even if null: transformers assumes 1 and 2 for keys that are absent.
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def from_hf(raw: dict[str, Any], where: str) -> LlamaConfig:
    """The configuration that a config.json describes.

    Args:
        raw: its content.
        where: how to name it in errors.

    Raises:
        ValueError: it is not a plain Llama, or a key is missing or out of range.
    """
    _check_architecture(raw, where)
    values = {**_DEFAULTS, **raw}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    missing = [theirs for theirs in _FIELDS.values() if values.get(theirs) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: take the config.json that was saved with the weights")
    fields = {ours: values[theirs] for ours, theirs in _FIELDS.items()}
    head_dim = values.get("head_dim")
    if head_dim is not None and head_dim * fields["num_heads"] != fields["hidden_dim"]:
        fields["head_dim"] = head_dim
    return LlamaConfig(**fields, rope=_rope_from_hf(values, where))


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    if rope.type == "default":
        return {"rope_type": "default"}
    scaling = {"rope_type": rope.type, "factor": rope.factor}
    return scaling if rope.type == "linear" else {**scaling, **{field: getattr(rope, field) for field in _LLAMA3_FIELDS}}


def _rope_from_hf(values: dict[str, Any], where: str) -> RopeConfig:
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta") or values.get("rope_theta") or 10000.0
    wanted = {"default": (), "linear": ("factor",), "llama3": ("factor", *_LLAMA3_FIELDS)}.get(rope_type)
    if wanted is None:
        raise ValueError(f"{where}: rope_type={rope_type!r} is not supported: use a model with 'default', 'linear' or 'llama3' positions")
    scaling = {"original_max_position_embeddings": values["max_position_embeddings"], **scaling}
    missing = [key for key in wanted if scaling.get(key) is None]
    if missing:
        raise ValueError(f"{where}: rope_type={rope_type!r} needs {', '.join(missing)} beside it in rope_parameters or rope_scaling")
    return RopeConfig(type=rope_type, theta=theta, **{key: scaling[key] for key in wanted})


def _check_architecture(raw: dict[str, Any], where: str) -> None:
    def refuse(key: str, remedy: str) -> None:
        raise ValueError(f"{where}: {key}={raw.get(key)!r} is not supported: {remedy}")

    if raw.get("model_type") != "llama":
        refuse("model_type", "only model_type='llama' can be imported")
    if ARCHITECTURE not in raw.get("architectures", [ARCHITECTURE]):
        refuse("architectures", f"only {ARCHITECTURE} can be imported")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            refuse(key, "this Llama has no biases; choose a model without them")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "this Llama's feed-forward layer is SwiGLU, hidden_act='silu'")
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        refuse("partial_rotary_factor", "this Llama rotates whole heads")
    if raw.get("quantization_config"):
        refuse("quantization_config", "save the model unquantized first")
