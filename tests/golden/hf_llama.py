"""Writes what tests/test_hf_golden.py compares with: tiny Llamas and their relatives as transformers saves and computes them.

    python tests/golden/hf_llama.py        # needs torch and transformers

Each case is a directory: config.json and model.safetensors as `save_pretrained` writes them, and expected.safetensors with
tokens, targets, logits, the mean cross-entropy, and its gradient in every weight ("grad." + name). The cases and
`reference` serve tests/test_hf_oracle.py too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).parent
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 0}
CASES: dict[str, dict[str, Any]] = {
    "gqa-untied": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "gqa-tied-llama3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "mha-untied-linear": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0}},
    "llama-biases-gelu": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rope_parameters": DEFAULT_ROPE},
    "llama-yarn-gelu-new": {"hidden_act": "gelu_new", "rope_parameters": YARN_ROPE},
    "mistral-window-yarn-mscale": {
        "model_type": "mistral",
        "sliding_window": 5,
        "rope_parameters": {**YARN_ROPE, "beta_fast": 2.0, "beta_slow": 0.2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    },
    "qwen2-window": {"model_type": "qwen2", **QWEN_WINDOW, "sliding_window": 6, "rope_parameters": DEFAULT_ROPE},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE},
    "qwen3-window-bias": {
        "model_type": "qwen3",
        **QWEN_WINDOW,
        "sliding_window": 7,
        "attention_bias": True,
        "rope_parameters": {**YARN_ROPE, "attention_factor": 1.3},
    },
}
TINY = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_model(case: str, *, scale: float = 0.1, **changes: Any) -> PreTrainedModel:
    """A model with random weights large enough that every part of it shows in the logits; `scale` is that of the matrices."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": "llama", **TINY, **CASES[case], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(scale * noise if weight.ndim == 2 else 0.1 * noise + (0 if name.endswith("bias") else 1))
    return model


def reference(model: PreTrainedModel, tokens: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, mean cross-entropy and gradients of int64 [B, S] tokens and targets, as float32 arrays by name."""
    model.zero_grad()
    logits = model(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    gradients = {f"grad.{name}": weight.grad.numpy() for name, weight in model.named_parameters()}
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy(), **gradients}


def main() -> None:
    """Writes every case beside this file."""
    rng = np.random.default_rng(0)
    for case in CASES:
        model = make_model(case)
        tokens, targets = rng.integers(0, TINY["vocab_size"], (2, 2, 24))
        model.save_pretrained(HERE / case)
        (HERE / case / "generation_config.json").unlink(missing_ok=True)
        expected = {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32), **reference(model, tokens, targets)}
        save_file({name: np.ascontiguousarray(array) for name, array in expected.items()}, HERE / case / "expected.safetensors")


if __name__ == "__main__":
    main()
