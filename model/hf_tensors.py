"""Where each tensor of a Hugging Face state lives in the parameter tree.

Hugging Face stores matrices as [out, in] and layer by layer; ours are stacked and most are [in, out]. Nothing else differs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from model.config import LlamaConfig
from model.parameters import Params, param_shapes

_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "bo": "self_attn.o_proj.bias",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}
_STORED_ALIKE = {"w_gate", "w_up"}  # [out, in] here too


class Tensor(NamedTuple):
    """Where one tensor of the Hugging Face state lives in the parameter tree."""

    name: str | None  # None: nowhere, it is a norm's weight of a model whose norms have none, and is one
    layer: int | None
    shape: tuple[int, ...]  # as Hugging Face stores it
    transposed: bool

    def view(self, params: Params) -> Any:
        """Its part of the tree, in our orientation, without the padding of the vocabulary."""
        if self.name is None:
            return np.ones(self.shape, np.float32)
        if self.layer is not None:
            return params["layers"][self.name][self.layer]
        rows, *columns = self.shape[::-1] if self.transposed else self.shape
        return params[self.name][(slice(rows), *map(slice, columns))]

    def stored(self, params: Params, dtype: np.dtype[Any]) -> np.ndarray:
        """It as Hugging Face stores it."""
        array = np.asarray(self.view(params))
        return np.ascontiguousarray(array.T if self.transposed else array, dtype=dtype)


def hf_tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor of the Hugging Face state by its name.

    Raises:
        ValueError: `config.vocab_size` is unset.
    """
    # norms without a weight are exported with one of ones
    weighted = param_shapes(config.model_copy(update={"use_layer_norm_weight": True}))
    ours = param_shapes(config)
    assert config.vocab_size is not None  # `param_shapes` needed it
    vocabulary = (config.vocab_size, config.hidden_dim)
    table = {
        "model.embed_tokens.weight": Tensor("embed", None, vocabulary, False),
        "model.norm.weight": Tensor("norm" if "norm" in ours else None, None, weighted["norm"].shape, False),
    }
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = Tensor("head", None, vocabulary, True)
    for layer in range(config.num_layers):
        for name, theirs in _LAYER_NAMES.items():
            if name not in weighted["layers"]:
                continue
            shape = weighted["layers"][name].shape[1:]
            transposed = len(shape) == 2 and name not in _STORED_ALIKE
            stored_shape = shape[::-1] if transposed else shape
            table[f"model.layers.{layer}.{theirs}"] = Tensor(name if name in ours["layers"] else None, layer, stored_shape, transposed)
    return table
