"""Schedules against tables worked out by hand, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from model.cycles import Cycle, cycles_of
from model.learning_rate import learning_rate_schedule
from model.train_config import SimpleTrainConfig


def train_config(**changes: object) -> SimpleTrainConfig:
    return SimpleTrainConfig(**{"train_batch_size": 4, "num_train_steps": 100, "learning_rate": 1.0, **changes})


# Peak 1, 100 steps; the numbers are worked out by hand.
TABLE = {
    "cosine": ({"warmup": 10, "min_lr_ratio": 0.1}, {0: 0, 5: 0.5, 10: 1, 25: 0.939711432, 55: 0.55, 100: 0.1}),
    "linear": ({"lr_schedule": "linear", "warmup": 0, "min_lr_ratio": 0}, {0: 1, 25: 0.75, 50: 0.5, 100: 0}),
    "constant": ({"lr_schedule": "constant", "warmup": 2}, {0: 0, 1: 0.5, 2: 1, 99: 1}),
    "inv": ({"lr_schedule": "inv", "warmup": 20, "min_lr_ratio": 0.2}, {10: 0.5, 20: 1, 40: 0.5, 60: 1 / 3, 100: 0.2}),
    "wsd": (
        {"lr_schedule": "linear", "warmup": 0.1, "decay": 0.2, "min_lr_ratio": 0.1},
        {0: 0, 9: 0.9, 10: 1, 79: 1, 80: 1, 90: 0.55, 99: 0.145, 100: 0.1},
    ),
    "inv_sqrt": (
        {"lr_schedule": "inv_sqrt", "num_train_steps": 2_000_000, "warmup": 2000, "min_lr_ratio": 0.1},
        {1000: 0.5, 2000: 1, 9000: 1, 10_000: 1, 40_000: 0.5, 90_000: 1 / 3, 1_000_000: 0.1, 1_500_000: 0.1},
    ),
    "two cycles": (  # the second rises from the 0.2 at which the first ended
        {"lr_schedule": "linear", "cycles": 2, "warmup": 10, "rewarmup": 20, "decay": 20, "min_lr_ratio": 0.2},
        {0: 0, 10: 1, 29: 1, 30: 1, 40: 0.6, 49: 0.24, 50: 0.2, 60: 0.6, 70: 1, 80: 1, 90: 0.6, 100: 0.2},
    ),
    "cycles at once": (
        {"lr_schedule": "linear", "cycle_length": (20, 80), "warmup": 0, "min_lr_ratio": 0},
        {0: 1, 10: 0.5, 19: 0.05, 20: 1, 60: 0.5, 100: 0},
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_schedule(name: str) -> None:
    changes, table = TABLE[name]
    schedule = learning_rate_schedule(train_config(**changes))
    np.testing.assert_allclose([schedule(step) for step in table], list(table.values()), rtol=2e-6, atol=1e-7)
    assert float(schedule(0)) == table.get(0, 0.0), "the first step is exact"


@pytest.mark.parametrize(
    ("changes", "cycles"),
    [
        ({"warmup": 0.25}, [(0, 25, 0, 75)]),
        ({"warmup": 25}, [(0, 25, 0, 75)]),
        ({"warmup": 1}, [(0, 100, 0, 0)]),  # 1 is all of it, as in Levanter
        ({"warmup": 0.5, "decay": 0.5, "num_train_steps": 7}, [(0, 4, 0, 3)]),
        ({"cycle_length": 40, "warmup": 0.1, "decay": 0.5, "rewarmup": 2}, [(0, 4, 16, 20), (40, 2, 18, 20), (80, 2, 8, 10)]),
        ({"cycle_length": 1 / 3, "warmup": 0}, [(0, 0, 0, 33), (33, 0, 0, 34), (67, 0, 0, 33)]),
        ({"cycles": 3, "warmup": 0}, [(0, 0, 0, 33), (33, 0, 0, 34), (67, 0, 0, 33)]),
        ({"cycle_length": [10, 20], "warmup": 0}, [(0, 0, 0, 10), (10, 0, 0, 20), (30, 0, 0, 70)]),
    ],
)
def test_cycles(changes: dict[str, object], cycles: list[tuple[int, ...]]) -> None:
    train = train_config(**changes)
    assert cycles_of(train) == [Cycle(*cycle) for cycle in cycles]
    assert train.warmup_steps == cycles[0][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 200}, r"train.warmup=200 steps is more than train.num_train_steps=100"),
        ({"warmup": 60, "decay": 50}, r"train.warmup=60 and train.decay=50 are 60 \+ 50 steps, more than train.num_train_steps=100"),
        ({"cycles": 4, "warmup": 30}, r"train.warmup=30 steps is more than the 25 steps of cycle 1 of 4"),
        ({"cycle_length": (60, 40), "rewarmup": 50}, r"train.rewarmup=50 steps is more than the 40 steps of cycle 2 of 2"),
        ({"cycle_length": (60, 50)}, r"train.cycle_length=\[60, 50\] is 110 steps, more than train.num_train_steps=100"),
        ({"cycle_length": 200}, r"train.cycle_length=200.* makes cycles of 200 steps"),
        ({"cycle_length": 0}, r"train.cycle_length=0.*: a cycle has at least one step"),
        ({"cycles": 101}, r"train.cycles=101 makes cycles of 0.990"),
        ({"cycles": 2, "cycle_length": 50}, r"train.cycle_length=50.* and train.cycles=2 say the same"),
        ({"rewarmup": 5}, r"train.rewarmup=5 has no effect in a single cycle"),
        ({"lr_schedule": "constant", "decay": 10}, r"train.decay=10.* has no effect with train.lr_schedule='constant'"),
        ({"lr_schedule": "constant", "cycles": 2}, r"train.cycles=2 has no effect with train.lr_schedule='constant'"),
        ({"lr_schedule": "inv", "min_lr_ratio": 0}, r"train.min_lr_ratio=0: train.lr_schedule='inv' never reaches 0"),
        ({"lr_schedule": "cosin"}, r"train.lr_schedule='cosin' is unknown \(did you mean 'cosine'\?\): use one of cosine, linear"),
        ({"lr_schedule": "wsd"}, r"train.lr_schedule='wsd' is train.lr_schedule='linear' with train.decay below 1"),
        ({"num_train_steps": 10_000, "cycle_length": 2}, r"makes 5000 cycles: choose one that makes at most 1000"),
    ],
)
def test_schedules_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_config(**changes)
