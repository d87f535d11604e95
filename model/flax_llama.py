"""The same Llama as a Flax module, for code that composes `flax.nnx` modules: a thin front over the pure functions.

model = Llama(config, rngs=nnx.Rngs(0))
logits_BSV = model(tokens_BS)
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from model import llama
from model.config import LlamaConfig
from model.parameters import Params, init_params


class Llama(nnx.Module):
    """Holds each weight of the parameter tree as an `nnx.Param`, by the names of `model.parameters`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs | None = None, params: Params | None = None) -> None:
        """Fresh weights from `rngs`, or the given parameter tree.

        Raises:
            ValueError: neither or both are given.
        """
        if (rngs is None) == (params is None):
            raise ValueError("Llama takes rngs= for fresh weights or params= for given ones, one of the two")
        if params is None:
            assert rngs is not None
            params = init_params(config, rngs.params())
        self.config = config
        self.weights = nnx.data(jax.tree.map(nnx.Param, params))

    def params(self) -> Any:
        """The parameter tree that `model.llama`, the trainer and `model.hf` take."""
        return jax.tree.map(lambda weight: weight[...], self.weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))

    def __call__(
        self, tokens_BS: jax.Array, *, segment_ids_BS: jax.Array | None = None, positions_BS: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B,S,V] float32; see `model.llama.forward`."""
        return llama.forward(self.params(), tokens_BS, self.config, segment_ids=segment_ids_BS, positions=positions_BS)
