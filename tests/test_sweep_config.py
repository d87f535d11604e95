"""Which arms a sweep has: values read and checked before anything runs, names, draws, and what a mistake is answered."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.config import EvalHarnessConfig, ExportConfig
from tasks.pipeline import run_steps
from tasks.presets import preset
from tasks.sweep_config import LONGEST_NAME, Span, Sweep, arm_name, parse_grid
from tasks.sweep_fields import split_values, value_at, value_of

DEBUG = preset("debug")


def sweep(*words: str, draws: int | None = None, seed: int = 0) -> Sweep:
    return Sweep(base=DEBUG, grid=parse_grid(words), draws=draws, seed=seed)


def test_every_combination_is_one_arm() -> None:
    arms = sweep("train.learning_rate=1e-3,3e-3", "train.weight_decay=0.1,0.03").arms()
    assert [arm.name for arm in arms] == [
        "debug-learning_rate-0.001",
        "debug-learning_rate-0.001-weight_decay-0.03",
        "debug",
        "debug-weight_decay-0.03",
    ]
    for arm in arms:
        assert {path: value_at(arm.config, path) for path in arm.values} == arm.values
    assert arms[2].config == DEBUG  # so that it is the run that is there


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("train.num_train_steps=10,20", [10, 20]),
        ("train.optimizer=adamw,lion", ["adamw", "lion"]),
        ("train.ema_beta=none,0.9", [None, 0.9]),
        ("train.nesterov=true,false", [True, False]),
        ("train.cycle_length=[60,180],0.5", [(60, 180), 0.5]),
        ("model.rope.theta=1e4,5e5", [1e4, 5e5]),
        ("data.weights.plays=0.5,.25", [0.5, 0.25]),
        ("train.train_batch_size=8,16", [8, 16]),
    ],
)
def test_values_are_of_the_fields_type(word: str, values: list[Any]) -> None:
    (path,) = (found := sweep(word)).grid
    assert [value_at(arm.config, path) for arm in found.arms()] == values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rate=1"], "RunConfig has no field 'learning_rate' (did you mean 'train.learning_rate'?)"),
        (["train.learning_rat=1"], "SimpleTrainConfig has no field 'learning_rat' (did you mean 'train.learning_rate'?)"),
        (["train.learning_rate=fast"], "train.learning_rate=fast: Input should be a valid number"),
        (["train.learning_rate=true"], "train.learning_rate=true: Input should be a valid number"),
        (["train.num_train_steps=1.5"], "train.num_train_steps=1.5: Input should be a valid integer"),
        (["train.learning_rate=1e-3,-1"], "train.learning_rate=-1: Input should be greater than 0"),
        (["train.optimizer=adamz"], "train.optimizer=adamz: Input should be 'adamw', 'muon'"),
        (["train.learning_rate=1e-3,0.001"], "train.learning_rate has the value 0.001 twice"),
        (["train.learning_rate="], "write field=value,value"),
        (["train.seed=1", "train.seed=2"], "--grid train.seed is there twice"),
        (["train.learning_rate=1e-4:1e-2:log"], "say how many arms to draw, or list the values"),
        (["train.learning_rate=1e-4:1e-2:lin"], "write low:high, or low:high:log"),
        (["train.steps_per_eval=3,4"], "does not change what is trained"),
        (["name=a,b"], "does not change what is trained"),
        (["model.hidden_dim.x=3"], "model.hidden_dim has no fields of its own"),
        (["model.num_kv_heads=2,5"], "the arm with model.num_kv_heads=5 cannot run: num_heads=8 is not a multiple of num_kv_heads=5"),
        (["train.seed=" + ",".join(map(str, range(1001)))], "the grid has 1,001 arms, more than 1,000"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        sweep(*words).arms()
    assert message in str(raised.value)


def test_draws_are_their_own_and_more_of_them_begin_the_same() -> None:
    word = "train.learning_rate=1e-5:1e-1:log"
    few, many = sweep(word, draws=4).arms(), sweep(word, draws=200).arms()
    assert [arm.name for arm in many[:4]] == [arm.name for arm in few]
    assert [arm.name for arm in sweep(word, draws=4, seed=1).arms()] != [arm.name for arm in few]
    exponents = [math.log10(arm.config.train.learning_rate) for arm in many]
    assert all(-5 <= exponent <= -1 for exponent in exponents)
    assert -3.3 < sum(exponents) / len(exponents) < -2.7  # uniform in the logarithm: 20 of them in each fifth, about
    assert all(sum(-5 + i <= exponent < -4 + i for exponent in exponents) > 30 for i in range(4))


def test_draws_of_whole_numbers_and_of_lists() -> None:
    arms = sweep("train.seed=1:4", "train.optimizer=adamw,lion", draws=8).arms()
    assert {arm.config.train.seed for arm in arms} == {1, 2, 3, 4}
    assert len({arm.name for arm in arms}) == 8
    with pytest.raises(ValueError, match=r"random=9: the values make only 8 different arms"):
        sweep("train.seed=1:4", "train.optimizer=adamw,lion", draws=9).arms()


def test_names_are_short_enough_and_unique() -> None:
    names = [
        arm_name("a" * 50, {"train.learning_rate": 1e-3}),
        arm_name("a" * 50, {"train.learning_rate": 1e-4}),
        arm_name("a", {"train.cycle_length": (1, 2)}),
        arm_name("a", {"train.cycle_length": (12,)}),
        arm_name("a", {"train.learning_rate": 1e30}),
        arm_name("a", {"train.learning_rate": 1e-30}),
        arm_name("a", {"train.x": 1, "model.x": 2}),
        arm_name("a", {"train.x": 2, "model.x": 1}),
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= LONGEST_NAME
        assert DEBUG.model_copy(update={"name": name}).model_validate({**dict(DEBUG), "name": name}).name == name


def test_declared_in_python_it_has_the_same_runs() -> None:
    declared = Sweep(base=DEBUG, grid={"train.learning_rate": (1e-3, 3e-3)})
    found, same = (
        [run_steps(arm.config).training.fingerprint for arm in s.arms()] for s in (declared, sweep("train.learning_rate=1e-3,3e-3"))
    )
    assert found == same
    assert Sweep.model_validate_json(declared.model_dump_json()) == declared
    drawn = Sweep(base=DEBUG, grid={"train.learning_rate": Span(low=1e-4, high=1e-2, log=True)}, draws=3)
    assert drawn.arms() == sweep("train.learning_rate=1e-4:1e-2:log", draws=3).arms()
    with pytest.raises(ValidationError, match=r"train.learning_rate='x': Input should be a valid number"):
        Sweep(base=DEBUG, grid={"train.learning_rate": ("x",)})
    with pytest.raises(ValidationError, match="a span goes from a lower to a higher value"):
        Span(low=0, high=1, log=True)


def test_tasks_pushes_and_exports_on_the_way_are_no_part_of_it() -> None:
    for field, change in (
        ("export.hub_repo_id", {"export": ExportConfig(hub_repo_id="org/name")}),
        ("train.steps_per_hf_export", {"train": DEBUG.train.model_copy(update={"max_checkpoints": None, "steps_per_hf_export": 40})}),
    ):
        with pytest.raises(ValidationError, match=field):
            Sweep(base=DEBUG.model_copy(update=change), grid={"train.learning_rate": (1e-3, 2e-3)})
    base = DEBUG.model_copy(update={"eval_harness": EvalHarnessConfig(tasks=("piqa",))})
    with pytest.raises(ValidationError, match=r"eval_harness.tasks: arms are compared by their held-out loss"):
        Sweep(base=base, grid={"train.seed": (1, 2)})


def test_lists_are_split_outside_of_brackets() -> None:
    assert split_values("1,[2,3],none") == ["1", "[2,3]", "none"]
    assert value_of("train.cycle_length", "[2,3]") == (2, 3)
