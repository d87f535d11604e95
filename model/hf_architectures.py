"""Which model of transformers can say what: the architecture that a `LlamaConfig` is exported as, and those that are imported.

| architecture       | `qk_norm` | `attention_bias` | `mlp_bias` | `sliding_window` |
|--------------------|-----------|------------------|------------|------------------|
| LlamaForCausalLM   | no        | no, or yes       | no, or yes | no               |
| MistralForCausalLM | no        | no               | no         | yes              |
| Qwen2ForCausalLM   | no        | qkv              | no         | no, or yes       |
| Qwen3ForCausalLM   | yes       | no, or yes       | no         | no, or yes       |

No JAX here, so that a plan can refuse a model that none of them is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.config import LlamaConfig

_LLAMA = "LlamaForCausalLM"


@dataclass(frozen=True)
class Architecture:
    """A model of transformers: its name, what it has, and what it assumes for keys that a config.json may leave out."""

    model_type: str
    name: str
    qk_norm: bool
    attention_bias: tuple[bool | Literal["qkv"], ...]
    mlp_bias: tuple[bool, ...]
    sliding_window: tuple[bool, ...]
    defaults: Mapping[str, Any]

    @property
    def windows_by_layer(self) -> bool:
        """Whether its config.json says of each layer if it has the window (Qwen)."""
        return len(self.sliding_window) == 2

    def is_model(self, config: LlamaConfig) -> bool:
        """Whether it can say what the configuration is."""
        return (
            config.qk_norm == self.qk_norm
            and config.attention_bias in self.attention_bias
            and config.mlp_bias in self.mlp_bias
            and (config.sliding_window is not None) in self.sliding_window
        )


_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "hidden_act": "silu"}
_MISTRAL = {**_COMMON, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096}
_QWEN = {
    **_COMMON,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", _LLAMA, False, (False, True), (False, True), (False,), {**_COMMON, "max_position_embeddings": 2048}),
        Architecture("mistral", "MistralForCausalLM", False, (False,), (False,), (True,), _MISTRAL),
        Architecture("qwen2", "Qwen2ForCausalLM", False, ("qkv",), (False,), (False, True), _QWEN),
        Architecture("qwen3", "Qwen3ForCausalLM", True, (False, True), (False,), (False, True), {**_QWEN, "head_dim": 128}),
    )
}


def not_exportable(config: LlamaConfig) -> str | None:
    """Why no config.json can describe a model, with the remedy, or None where one can."""
    if config.logit_soft_cap is not None:
        return (
            f"model.logit_soft_cap={config.logit_soft_cap:g} has no place in a Hugging Face {_LLAMA}, which would give other "
            f"logits: leave it unset (train.z_loss_weight keeps logits small too)"
        )
    for field in ("hybrid_norm", "input_embedding_norm"):
        if getattr(config, field):
            return f"model.{field}=True has no place in a Hugging Face {_LLAMA}, which has no such norm: leave it off"
    if _architecture(config) is None:
        return (
            f"no Hugging Face model has model.qk_norm={config.qk_norm}, model.attention_bias={config.attention_bias}, "
            f"model.mlp_bias={config.mlp_bias} and model.sliding_window={config.sliding_window} together: Llama has attention_bias and "
            f"mlp_bias, Mistral sliding_window, Qwen 2 attention_bias='qkv' and sliding_window, Qwen 3 qk_norm, attention_bias and "
            f"sliding_window; leave one of them off"
        )
    return None


def architecture_of(config: LlamaConfig) -> Architecture:
    """The architecture that the model is exported as.

    Raises:
        ValueError: there is none.
    """
    if (why := not_exportable(config)) is not None:
        raise ValueError(why)
    found = _architecture(config)
    assert found is not None  # `not_exportable` asked
    return found


def _architecture(config: LlamaConfig) -> Architecture | None:
    return next((architecture for architecture in ARCHITECTURES.values() if architecture.is_model(config)), None)
