"""What a sweep costs, how its table reads, and how the steps of its arms are scheduled; real runs are in tests/test_sweep_runs.py."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from flows import sweep_schedule
from flows.sweep import sweep_llama
from flows.sweep_schedule import RunSchedule
from tasks.pipeline import label
from tasks.planning import Plan, plan_run
from tasks.presets import preset
from tasks.steps import Step
from tasks.sweep_budget import Budget
from tasks.sweep_config import Sweep, parse_grid
from tasks.sweep_plan import plan_sweep
from tests.test_command_line import CHECKOUT, HEAVY, run

BASE = preset("debug")
WORDS = ["train.learning_rate=1e-3,3e-3", "train.num_train_steps=100,200"]
SWEEP = Sweep(base=BASE, grid=parse_grid(WORDS))


def planned(root: Path, budget: str | None = None, *, fit: bool = False, said: list[str] | None = None):
    return plan_sweep(SWEEP, root, budget=budget, fit=fit, tell=(said if said is not None else []).append)


def test_a_budget_is_kept_to_or_refused_with_the_numbers(tmp_path: Path) -> None:
    plans = planned(tmp_path).plans
    total = sum(plan.total_flops for plan in plans)
    assert [plan.total_flops * 2 for plan in plans[::2]] == [plan.total_flops for plan in plans[1::2]]
    assert planned(tmp_path, f"{total * 1.001}FLOPs").taken == (True,) * 4
    with pytest.raises(ValueError, match=r"budget=1\d\.\d TFLOP: the 4 arms need about 2\d\.\d TFLOP, 2 of them .* \(--fit-budget\)"):
        planned(tmp_path, f"{total * 0.6}FLOPs")
    # Of steps 100, 200, 100, 200 the first two are a half and the third fits in what is left.
    said: list[str] = []
    assert planned(tmp_path, f"{total * 0.7}FLOPs", fit=True, said=said).taken == (True, True, True, False)
    assert "3 of 4 arms" in said[0]
    with pytest.raises(ValueError, match=r"the smallest .*: raise the budget"):
        planned(tmp_path, "1FLOPs", fit=True)


def test_budgets_in_hours_and_dollars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_run(BASE, tmp_path)
    assert plan.seconds is not None
    assert Budget.parse("3 Hours").cost(plan, tell=print) == plan.seconds / 3600
    with pytest.raises(ValueError, match=r"this machine has no price: give it in FLOPs, or set train.accelerator_type"):
        Budget.parse("3dollars").cost(plan, tell=print)
    slice_plan = plan_run(BASE.model_copy(update={"train": BASE.train.model_copy(update={"accelerator_type": "v4-8"})}), tmp_path)

    class Found:
        hours, dollars = 2.0, 25.0

    monkeypatch.setattr("tasks.sweep_budget.preflight", lambda *given, **named: Found)
    assert Budget.parse("30dollars").cost(slice_plan, tell=print) == 25.0
    assert Budget.parse("3hours").cost(slice_plan, tell=print) == 2.0
    for text, message in {"3": "write an amount", "3houres": r"did you mean 'hours'\?", "x hours": "write an amount"}.items():
        with pytest.raises(ValueError, match=message):
            Budget.parse(text)


def test_the_table_is_by_loss_and_names_the_best(tmp_path: Path) -> None:
    table = planned(tmp_path, "20TFLOPs".replace("T", "e12"), fit=True).table
    assert [row.state for row in table.rows].count("left out") > 0
    for row, loss in zip(table.rows, (3.0, 2.5), strict=False):
        row.state, row.outcome = "finished", {"train/loss": loss, "eval/loss": loss, "eval/bpb": "nan"}
    assert table.best is table.rows[1]
    lines = table.lines()
    assert [line[0] for line in lines[:2]] == [table.rows[1].name, table.rows[0].name]
    assert table.columns()[:3] == ("arm", "learning_rate", "num_train_steps")
    assert lines[0][3:7] == ("2.5000", "2.5000", "nan", "finished")
    assert lines[-1][-2] == "left out: no room in the budget"
    assert "best debug-learning_rate-0.001-num_train_steps-200 with held-out loss 2.5000" in table.headline()
    table.rows[1].outcome["eval/loss"] = "nan"  # a run that went wrong is not the best
    assert table.best is table.rows[0]
    table.save(tmp_path / "sweeps" / "x" / "sweep.json")
    assert json.loads((tmp_path / "sweeps" / "x" / "sweep.json").read_text())["rows"][0]["values"] == table.rows[0].values


class Futures:
    """Stands in for Prefect's tasks: a thread ends each step; what begins, in order, and how many at most at once."""

    def __init__(self, broken: str = "") -> None:
        self.began: list[str] = []
        self.most = 0
        self._broken = broken
        self._training = 0
        self._lock = threading.Lock()

    def submit(self, step: Step, plan: Plan, futures: dict[str, Any]) -> Future[str]:
        assert all(futures[upstream.fingerprint].result() for upstream in step.upstream)
        future: Future[str] = Future()
        trains = step.kind in ("checkpoints", "hf")
        with self._lock:
            self.began.append(label(step))
            self._training += trains
            self.most = max(self.most, self._training)

        def end() -> None:
            with self._lock:
                self._training -= trains
            if label(step) == self._broken:
                future.set_exception(ValueError("it broke"))
            else:
                future.set_result("done")

        threading.Thread(target=end).start()
        return future


def schedule(root: Path, monkeypatch: pytest.MonkeyPatch, futures: Futures, most: int) -> dict[int, list[tuple[str, str]]]:
    told: dict[int, list[tuple[str, str]]] = {number: [] for number in range(4)}
    monkeypatch.setattr(sweep_schedule, "submit", futures.submit)
    RunSchedule(planned(root).taken_plans, most, lambda number, state, why: told[number].append((state, why))).run()
    return told


@pytest.mark.parametrize("most", [1, 2])
def test_steps_run_once_and_so_many_arms_at_a_time(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    futures = Futures()
    told = schedule(tmp_path, monkeypatch, futures, most)
    assert told == {number: [("running", ""), ("finished", "")] for number in range(4)}
    assert len(futures.began) == len(set(futures.began)) == 6 + 4 * 2  # all arms share the data
    assert 1 <= futures.most <= most
    if most == 1:  # an arm is exported before the next one trains
        assert [name.split("/")[0] for name in futures.began[6:]] == ["checkpoints", "hf"] * 4


def test_a_failure_ends_only_what_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = f"checkpoints/{SWEEP.arms()[1].name}"
    told = schedule(tmp_path, monkeypatch, Futures(broken), 2)
    assert told.pop(1) == [("running", ""), ("failed", f"{broken}: it broke")]
    assert all(states == [("running", ""), ("finished", "")] for states in told.values())
    told = schedule(tmp_path, monkeypatch, Futures("tokens/sonnets"), 2)
    assert all(states == [("failed", "tokens/sonnets: it broke")] for states in told.values())


def test_told_to_stop_it_stops_the_children_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    class Running:
        def __init__(self, name: str) -> None:
            self._name = name

        def add_done_callback(self, _done: Any) -> None:
            raise KeyboardInterrupt  # comes while steps are under way

        def wait(self) -> None:
            assert stopped, "the children were not stopped first"
            waited.append(self._name)

    stopped: list[bool] = []
    monkeypatch.setattr(sweep_schedule, "submit", lambda step, plan, futures: Running(label(step)))
    monkeypatch.setattr(sweep_schedule, "stop_children", lambda: stopped.append(True))
    with pytest.raises(KeyboardInterrupt):
        RunSchedule(planned(tmp_path).taken_plans, 2, lambda *told: None).run()
    assert waited == ["raw/plays"]


def test_the_command_plans_and_refuses(tmp_path: Path) -> None:
    script = CHECKOUT / "flows" / "sweep.py"
    done = run("tiny", "--grid", "train.learning_rate=1e-3,2e-3", "--grid", "train.seed=1,2", "--plan", root=tmp_path, script=script)
    assert done.returncode == 0, done.stderr
    for words in ("4 of 4", "tiny-learning_rate-0.001-seed-2", "first run of this step"):
        assert words in done.stdout
    assert not any(tmp_path.iterdir())
    refused = run("--grid", "train.learning_rat=1", root=tmp_path, script=script)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "error: train.learning_rat: SimpleTrainConfig has no field 'learning_rat' (did you mean 'train.learning_rate'?)"
    )


def test_an_experiments_file_declares_one_without_anything_heavy(tmp_path: Path) -> None:
    script = CHECKOUT / "flows" / "experiments" / "exp5_learning_rate_sweep.py"
    done = run("--plan", "--train.num-train-steps", "50", root=tmp_path, script=script, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {*HEAVY, "prefect", "scipy"}
    assert "6 of 6" in done.stdout
    assert "rates-learning_rate-0.01-weight_decay-0.01" in done.stdout
    assert "307k in all" in done.stdout  # 6 arms x 50 steps x 8 x 128


def test_the_form_in_the_ui() -> None:
    properties = sweep_llama.parameters.properties
    assert sweep_llama.name == "sweep-llama"
    assert all(field.get("description") for field in properties.values())
    assert properties["max_concurrent"]["minimum"] == 1
