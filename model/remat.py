"""What the backward pass finds in memory and what it computes again.

The layers name the activations that are worth keeping (`checkpoint_name`); a policy lists which of them to keep.
From the least memory to the least work, with what the policy keeps of each token and layer in numbers of the compute dtype
(D hidden width, F feed-forward width, H query and G key/value heads of width K), beside the D of the residual stream:

| policy          | keeps besides                              | computes again            |
|-----------------|--------------------------------------------|---------------------------|
| `full`          | nothing                                    | all but the last product  |
| `save_attn`     | attention output: H K                      | all but attention         |
| `save_qkv_attn` | and q, k, v: (H + 2 G) K                   | `wo`, gate, up            |
| `save_all`      | and gate and up: 2 F                       | `wo` only                 |
| `none`          | whatever autodiff asks for                 | nothing                   |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

from model.config import RematPolicy

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

ATTENTION_RESIDUAL = "attn_residual"  # what the attention kernel's own backward pass needs of its forward pass

_KEPT: dict[RematPolicy, tuple[str, ...]] = {
    "full": (),
    "save_attn": ("attn_out", ATTENTION_RESIDUAL),
    "save_qkv_attn": ("attn_out", ATTENTION_RESIDUAL, "qkv"),
    "save_all": ("attn_out", ATTENTION_RESIDUAL, "qkv", "mlp_gate", "mlp_up"),
}


def rematerialised(layer: Callable[Arguments, Result], policy: RematPolicy, *, scanned: bool) -> Callable[Arguments, Result]:
    """`layer`, whose backward pass computes again what the policy does not keep.

    Args:
        scanned: the layer is the body of a scan, which keeps the recomputation apart from the forward pass by itself.
    """
    if policy == "none":
        return layer
    names = jax.checkpoint_policies.save_only_these_names(*_KEPT[policy])
    return jax.checkpoint(layer, policy=names, prevent_cse=not scanned)
