"""The command line of an experiment's file: its runs, their flags, what they need of each other, and what becomes of them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect.states import Completed, Failed

from flows.at_once import Outcome, exit_status, run_all
from flows.executor import declared_runs, run_experiments
from model.config import LlamaConfig
from model.learning_rate import learning_rate_schedule
from model.train_config import SimpleTrainConfig
from tasks.anneal import anneal_after
from tasks.children import ChildStopped, allow_children, stopping
from tasks.config import RunConfig
from tasks.datasets import shakespeare_mixture
from tasks.experiment import default_train
from tasks.pipeline import StepsFailed
from tasks.planning import plan_run
from tasks.sources import NotListed, remote_files

CHECKOUT = Path(__file__).resolve().parent.parent
FILES = sorted((CHECKOUT / "flows" / "experiments").glob("exp*.py"))
MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=1, num_heads=2, num_kv_heads=1)
TRAIN = SimpleTrainConfig(train_batch_size=8, num_train_steps=10, learning_rate=1e-3)


def run(name: str) -> RunConfig:
    return default_train(name, shakespeare_mixture(), MODEL, TRAIN)


def fails(error: BaseException) -> Callable[[], str]:
    def job() -> str:
        raise error

    return job


def states(outcomes: list[Outcome[str]]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


@pytest.mark.parametrize("most", [1, 3])
def test_what_fails_keeps_back_only_what_needs_it(most: int) -> None:
    failure = StepsFailed({"tokens/web": ValueError("no text")}, ["mixtures/m", "hf/a"])
    jobs = {"a": fails(failure), "b": lambda: "b", "c": lambda: "c", "d": lambda: "d"}
    outcomes = run_all(jobs, {"c": "a", "d": "b"}, most)
    assert states(outcomes) == {"a": "failed", "b": "done", "c": "left out", "d": "done"}
    assert (outcomes[0].failed, outcomes[0].left) == (("tokens/web",), ("mixtures/m", "hf/a"))
    assert outcomes[2].row() == ("c", "left out", "", "", "it needs a, which failed")
    assert [outcome.result for outcome in outcomes] == [None, "b", None, "d"]
    assert exit_status(outcomes) == 1
    assert exit_status(outcomes[1:2]) == 0


def test_so_many_at_once_and_no_more() -> None:
    under_way, most, met = 0, 0, threading.Barrier(2, timeout=60)
    lock = threading.Lock()

    def job() -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        met.wait()  # two have to be here together, or it would never end
        with lock:
            under_way -= 1
        return ""

    assert {*states(run_all({str(number): job for number in range(6)}, {}, 2)).values()} == {"done"}
    assert most == 2


def test_a_stop_is_no_failure_and_begins_nothing_more() -> None:
    outcomes = run_all({"a": fails(ChildStopped("saved at step 3")), "b": lambda: "b"}, {}, 1)
    assert states(outcomes) == {"a": "stopped", "b": "stopped"}
    assert [outcome.why for outcome in outcomes] == ["saved at step 3", "it had not begun"]
    assert exit_status(outcomes) == 130
    allow_children()


def test_the_message_of_failed_steps() -> None:
    error = StepsFailed({"tokens/a": ValueError("no text"), "tokens/b": OSError("disk full")}, ["mixtures/m"])
    assert str(error) == "no text\nalso tokens/b: disk full\nnot run, because they need them: mixtures/m"


def test_flags_change_every_run_and_what_is_gone_on_from_comes_first() -> None:
    base, other = run("base"), run("other")
    later = anneal_after("later", base, dataset_config=shakespeare_mixture(), num_anneal_training_tokens=8 * 64 * 5, train_batch_size=8)
    runs = declared_runs([other, later], "", ["--train.seed", "5"])
    assert [declared.name for declared in runs] == ["other", "base", "later"]
    assert [declared.config.train.seed for declared in runs] == [5, 5, 5]
    assert runs[2].begins is not None
    assert (runs[2].base, runs[2].begins.base) == ("base", runs[1].config)
    with pytest.raises(ValueError, match=r"two runs of this file are named 'base'"):
        declared_runs([base, base.model_copy(update={"train": TRAIN.model_copy(update={"seed": 9})})], "", [])
    with pytest.raises(ValueError, match=r"executor_main\(steps=\[\]\) has nothing to run"):
        declared_runs([], "", [])


def test_one_name_for_several_runs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--name='x' would name all 2 runs of this file alike \(one, two\): leave it out"):
        declared_runs([run("one"), run("two")], "", ["--name", "x"])
    with pytest.raises(ValueError, match=r"--name='one' would name all 2 runs"):
        declared_runs([run("one"), run("two")], "", ["--name", "one"])
    (alone,) = declared_runs([run("one")], "", ["--name", "x"])
    assert alone.name == "x"


def test_flags_of_a_run_that_goes_on_are_those_of_its_anneal(tmp_path: Path) -> None:
    base = run("base")
    given = {
        "dataset_config": shakespeare_mixture(),
        "num_anneal_training_tokens": 8 * 64 * 5,
        "train_batch_size": 8,
        "learning_rate": 2e-3,
    }
    later = anneal_after("later", base, **given)

    def trained(*flags: str) -> tuple[RunConfig, RunConfig, tuple[str, ...]]:
        before, after = declared_runs([later], "", [*flags, "--root", str(tmp_path)])
        return before.whole(tmp_path), after.whole(tmp_path), after.unchanged

    before, after, _ = trained("--train.num-train-steps", "20")
    assert (before.train.num_train_steps, after.train.num_train_steps) == (20, 40)  # its own 20 come after those of the base
    assert Path(str(after.train.initialize_from_checkpoint_path)).name == "20"
    before, after, _ = trained("--train.learning-rate", "4e-3", "--train.min-lr-ratio", "0.5")
    rate = learning_rate_schedule(after.train)
    assert before.train.learning_rate == 4e-3
    assert [float(rate(step)) for step in (10, 15)] == pytest.approx([4e-3, 2e-3], rel=1e-4)
    before, after, unchanged = trained("--train.warmup", "9", "--train.lr-schedule", "constant", "--train.min-lr-ratio", "0.1")
    assert (before.train.warmup_steps, before.train.lr_schedule) == (9, "constant")
    assert (after.train.warmup_steps, after.train.lr_schedule, unchanged) == (0, "linear", ("warmup", "lr_schedule"))
    first, second = declared_runs([later], "", ["--train.initialize-from-checkpoint-path=elsewhere/7", "--train.seed", "3"])
    assert first.config.train.initialize_from_checkpoint_path == "elsewhere/7"
    assert second.config.train.initialize_from_checkpoint_path == "base/checkpoints/10"
    assert (first.config.train.seed, second.config.train.seed) == (3, 3)
    before, after, _ = trained("--train.train-batch-size", "0:8", "3:16")
    assert [(stage.start, stage.value) for stage in after.train.batch_schedule.stages] == [(0, 8), (13, 16)]


@pytest.mark.parametrize(
    ("flags", "status", "shown"),
    [
        (
            [],
            0,
            [
                "checkpoints/one",
                "checkpoints/two",
                "checkpoints/later",
                "with the last checkpoint of two, which is trained first",
                "2.56k = 5 steps",
                "after step 10 of a run that saw 5.12k",
            ],
        ),
        (["--only", "tokens"], 0, ["tokens/plays"]),
        (["--only", "hf/one"], 0, ["checkpoints/one"]),
        (["--only", "chekpoints"], 2, ["--only='chekpoints' matches no step; the steps are raw/plays"]),
        (["--force", "checkpoints/two"], 0, ["forced"]),
        (["--deploy", "local"], 1, ["--deploy: later goes on from two, which is not trained yet: run the file first", "deployed"]),
        (["--deploy", "local", "--only", "hf", "--force", "hf"], 2, ["runs none, so --only and --force would have no effect"]),
        (["--deploy", "local", "--max-concurrent", "2"], 2, ["so --max-concurrent would have no effect: leave it out"]),
        (["--only", "^raw/plays"], 0, ["of source files", "raw/plays"]),
        (["--max-concurrent", "0"], 2, ["--max-concurrent=0: give how many runs"]),
    ],
)
def test_plans(
    flags: list[str], status: int, shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = run("two")
    later = anneal_after("later", two, dataset_config=shakespeare_mixture(), num_anneal_training_tokens=8 * 64 * 5, train_batch_size=8)
    monkeypatch.setattr("flows.deploying.deploy", lambda *_: "deployed")
    given = [] if "--deploy" in flags else ["--plan"]
    assert run_experiments([run("one"), two, later], "three", [*given, "--root", str(tmp_path / "root"), *flags]) == status
    said = capsys.readouterr()
    for text in shown:
        assert text in said.out + said.err
    if flags[:2] == ["--only", "hf/one"]:
        assert "checkpoints/two" not in said.out
    if flags == ["--only", "chekpoints"]:
        assert said.err.count("raw/plays") == 1
    if flags == ["--only", "^raw/plays"]:  # nothing is trained
        for text in ("compute", "time", "share", "checkpoints/one", "raw/sonnets"):
            assert text not in said.out
    assert not any(tmp_path.iterdir())


def test_an_interrupted_flow_says_where_its_training_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import train_flow

    class Future:
        def __init__(self, result: object) -> None:
            self.state = Completed() if result is None else Failed()
            self._result = result

        def add_done_callback(self, _: object) -> None:
            pass

        def wait(self, timeout: float | None = None) -> None:
            if not stopping():
                raise KeyboardInterrupt

        def result(self, *, raise_on_failure: bool) -> object:
            assert not raise_on_failure
            return self._result

    stopped = ChildStopped("training one was stopped and saved at step 640", saved=True)
    monkeypatch.setattr(train_flow, "submit", lambda step, *_: Future(stopped if step.kind == "checkpoints" else None))
    with pytest.raises(KeyboardInterrupt, match="saved at step 640"):
        train_flow.run_plan(plan_run(run("one"), tmp_path))
    allow_children()


def test_the_files_that_ship_import_nothing_heavy_and_do_nothing(tmp_path: Path) -> None:
    assert len(FILES) >= 6
    code = (
        "import json, runpy, sys\n"
        "for file in sys.argv[1:]: runpy.run_path(file)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    command = [sys.executable, "-c", code, *map(str, FILES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env={"OWN_TEXT": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert not {"jax", "tensorflow", "seqio", "prefect", "flax", "orbax", "torch"} & {*json.loads(done.stdout)}
    assert not any(tmp_path.iterdir())


def test_the_guides_script_is_planned_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the compiler says of it is in a slow test: here it is told that there is none."""
    import runpy

    def away(*_: object) -> None:
        raise NotListed("cannot be listed (no network)")

    monkeypatch.setattr(remote_files, "_recently", away)
    monkeypatch.setattr("flows.command_line.preflight", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["exp1077", "--plan", "--root", str(tmp_path / "root")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(CHECKOUT / "flows" / "experiments" / "exp1077_reproduce_dclm_1b1x.py"), run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for text in ("2.14B parameters", "28.8B = 54931 steps x 524k (256 sequences of 2048)", "7.42 TiB of source files", "92.57 %"):
        assert text in said
    assert not any(tmp_path.iterdir())
