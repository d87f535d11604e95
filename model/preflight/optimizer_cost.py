"""What an optimizer adds to a step beside reading and writing its state: products, traffic between chips, further gradients. No JAX."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from model.config import LlamaConfig
from model.train_config import SimpleTrainConfig


@dataclass(frozen=True)
class OptimizerCost:
    """Of one step on one chip, on average over steps."""

    flops: float = 0.0  # of matrix products
    ici_bytes: float = 0.0  # sent to other chips
    further_gradients: float = 0.0  # beside the step's own one; not in `flops`


def optimizer_cost(model: LlamaConfig, train: SimpleTrainConfig, chips: int) -> OptimizerCost:
    """chips: those that hold one copy of the weights between them."""
    if train.optimizer == "sophia":
        return OptimizerCost(further_gradients=1 / train.sophia.update_interval)
    if train.optimizer == "muon":
        return _muon_cost(model, train.muon.ns_steps, chips)
    return OptimizerCost()


def _muon_cost(model: LlamaConfig, ns_steps: int, chips: int) -> OptimizerCost:
    """An iteration is 4 S^2 L + 2 S^3 for a matrix of sides S <= L. `model.muon` deals out matrices by shape, zeros filling up."""
    hidden, queries, keys = model.hidden_dim, model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    in_a_layer = Counter([(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), *[(model.intermediate_dim, hidden)] * 3])
    flops = sent = 0.0
    for sides, count in in_a_layer.items():
        short, long = sorted(sides)
        each = math.ceil(count * model.num_layers / chips)
        flops += each * ns_steps * (4 * short**2 * long + 2 * short**3)
        sent += each * 4 * 2 * short * long * (chips - 1) / chips  # float32, there and back
    return OptimizerCost(flops, sent)
