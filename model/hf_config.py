"""`LlamaConfig` to and from the config.json of Hugging Face transformers, 4.x and 5.x.

transformers 4 reads `rope_theta` and `rope_scaling`, 5 reads `rope_parameters`: all three are written, either is read. Which
architecture it is there, and what none of them is, stands in `model.hf_architectures`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

from model.config import Activation, LlamaConfig, RopeConfig
from model.hf_architectures import ARCHITECTURES, Architecture, architecture_of

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
_ACTIVATIONS: dict[str, Activation] = {**{name: name for name in get_args(Activation)}, "swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
# What must stand beside a rope_type, and what may; names are the same on both sides.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_YARN_OPTIONS = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")


class SpecialIds(NamedTuple):
    """Ids of the tokenizer's special tokens; None where it has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def to_hf(config: LlamaConfig, *, dtype: str, special: SpecialIds) -> dict[str, Any]:
    """The content of config.json; `dtype` is that of the weights beside it.

    Raises:
        ValueError: no model of transformers is this one.
    """
    architecture = architecture_of(config)
    rope = _rope_to_hf(config.rope)
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "head_dim": config.head_size,
        "hidden_act": config.activation_function,
        **_variant_to_hf(config, architecture),
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
        ValueError: it is no model that this one can be, or a key is missing or out of range.
    """
    architecture = _architecture(raw, where)
    values = {**architecture.defaults, **raw}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    missing = [theirs for theirs in _FIELDS.values() if values.get(theirs) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: take the config.json that was saved with the weights")
    fields = {ours: values[theirs] for ours, theirs in _FIELDS.items()}
    head_dim = values.get("head_dim")
    if head_dim is not None and head_dim * fields["num_heads"] != fields["hidden_dim"]:
        fields["head_dim"] = head_dim
    fields["activation_function"] = _ACTIVATIONS[values["hidden_act"]]
    return LlamaConfig(**fields, **_variant_from_hf(values, architecture, where), rope=_rope_from_hf(values, where))


def _variant_to_hf(config: LlamaConfig, architecture: Architecture) -> dict[str, Any]:
    """The keys that not all architectures have."""
    keys: dict[str, Any] = {}
    if True in architecture.attention_bias:
        keys["attention_bias"] = config.attention_bias
    if True in architecture.mlp_bias:
        keys["mlp_bias"] = config.mlp_bias
    if True in architecture.sliding_window:
        keys["sliding_window"] = config.sliding_window
    if architecture.windows_by_layer:
        windowed = config.sliding_window is not None
        keys["use_sliding_window"] = windowed
        keys["max_window_layers"] = 0 if windowed else config.num_layers  # the first layer with a window
        keys["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * config.num_layers
    return keys


def _variant_from_hf(values: dict[str, Any], architecture: Architecture, where: str) -> dict[str, Any]:
    biased = bool(values.get("attention_bias"))
    return {
        "qk_norm": architecture.qk_norm,
        "attention_bias": biased if True in architecture.attention_bias else architecture.attention_bias[0],
        "mlp_bias": bool(values.get("mlp_bias")) and True in architecture.mlp_bias,
        "sliding_window": _window_from_hf(values, architecture, where) if True in architecture.sliding_window else None,
    }


def _window_from_hf(values: dict[str, Any], architecture: Architecture, where: str) -> int | None:
    """The window of all layers.

    Raises:
        ValueError: only some of them have it.
    """
    window = values["sliding_window"]
    if architecture.windows_by_layer and not values["use_sliding_window"]:
        window = None
    count = values["num_hidden_layers"]
    first = values["max_window_layers"] if architecture.windows_by_layer else 0
    types = values.get("layer_types") or ["sliding_attention" if layer >= first else "full_attention" for layer in range(count)]
    if window is None or set(types) == {"full_attention"}:
        return None
    if set(types) != {"sliding_attention"}:
        raise ValueError(
            f"{where}: sliding_window={window} in some layers only (layer_types, max_window_layers) is not supported: "
            f"use a model that has it in all layers or in none"
        )
    return window


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    options = {key: getattr(rope, key) for key in _YARN_OPTIONS} if rope.type == "yarn" else {}
    fields = {key: getattr(rope, key) for key in _ROPE_FIELDS[rope.type]}
    return {"rope_type": rope.type, **fields, **{key: value for key, value in options.items() if value is not None}}


def _rope_from_hf(values: dict[str, Any], where: str) -> RopeConfig:
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta") or values.get("rope_theta") or 10000.0
    wanted = _ROPE_FIELDS.get(rope_type)
    if wanted is None:
        raise ValueError(f"{where}: rope_type={rope_type!r} is not supported: use a model with positions of {', '.join(_ROPE_FIELDS)}")
    scaling = {"original_max_position_embeddings": values["max_position_embeddings"], **scaling}
    missing = [key for key in wanted if scaling.get(key) is None]
    if missing:
        raise ValueError(f"{where}: rope_type={rope_type!r} needs {', '.join(missing)} beside it in rope_parameters or rope_scaling")
    options = {key: scaling[key] for key in _YARN_OPTIONS if scaling.get(key) is not None} if rope_type == "yarn" else {}
    if not (options.get("mscale") and options.get("mscale_all_dim")):  # transformers heeds neither then
        options = {key: value for key, value in options.items() if not key.startswith("mscale")}
    return RopeConfig(type=rope_type, theta=theta, **{key: scaling[key] for key in wanted}, **options)


def _architecture(raw: dict[str, Any], where: str) -> Architecture:
    def refuse(key: str, remedy: str) -> None:
        raise ValueError(f"{where}: {key}={raw.get(key)!r} is not supported: {remedy}")

    model_type = raw.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise ValueError(f"{where}: model_type={model_type!r} is not supported: only {', '.join(ARCHITECTURES)} can be imported")
    if architecture.name not in (raw.get("architectures") or [architecture.name]):
        refuse("architectures", f"only {architecture.name} can be imported")
    if raw.get("hidden_act", "silu") not in _ACTIVATIONS:
        refuse("hidden_act", f"the activations here are {', '.join(_ACTIVATIONS)}")
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        refuse("partial_rotary_factor", "this Llama rotates whole heads")
    if raw.get("quantization_config"):
        refuse("quantization_config", "save the model unquantized first")
    return architecture
