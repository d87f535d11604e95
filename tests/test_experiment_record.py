"""The record of an experiment: written before anything runs, with the code's state, the steps and the links, and without secrets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from model.config import LlamaConfig
from model.preflight.result import Preflight
from model.tracker_services import tracker_name
from model.train_config import SimpleTrainConfig
from tasks.artifacts import commit
from tasks.config import RunConfig
from tasks.datasets import Mixture
from tasks.experiment_record import launch_record, read_record, record_markdown, record_place, training_step
from tasks.places import Place, place_of
from tasks.planning import Plan, plan_run
from tasks.source_control import code_state
from tasks.vocabularies import ByteTokenizer
from tests.object_store import BUCKET, object_store, use_store

HF_TOKEN = "hf_" + "abcdEFGH" * 4


def plan(tmp_path: Path, root: str | Place | None = None, **changes: object) -> Plan:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be.\n" * 40)
    data = Mixture.model_validate(
        {
            "name": "mix",
            "datasets": [{"name": "own", "source": str(text), "document": "line"}],
            "weights": {"own": 1.0},
            "tokenizer": ByteTokenizer(),
        }
    )
    config = RunConfig(
        name="mine",
        model=LlamaConfig(seq_len=32, hidden_dim=32, intermediate_dim=48, num_layers=1, num_heads=2, num_kv_heads=1),
        train=SimpleTrainConfig(train_batch_size=8, num_train_steps=4, learning_rate=1e-3),
        data=data,
        **changes,
    )
    return plan_run(config, root or tmp_path / "root")


def git(directory: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


def test_a_record_is_there_before_anything_ran(tmp_path: Path) -> None:
    planned = plan(tmp_path, tags=("x",), track=("wandb",))
    step = training_step(planned)
    assert step is not None
    written = launch_record(planned, "does it learn?", {"id": "1", "name": "run", "url": "http://127.0.0.1/runs/1"})
    assert written is not None
    place, record = written
    directory = step.directory(planned.root)
    assert place == record_place(directory) == tmp_path / "root" / "experiments" / f"mine-{step.fingerprint[:16]}.json"
    assert not Path(str(directory)).exists()
    assert read_record(directory) == record
    assert (record["description"], record["run_id"], record["tags"]) == ("does it learn?", step.fingerprint[:16], ["x"])
    assert record["config"] == planned.config.model_dump(mode="json")
    assert {each["step"]: each["fingerprint"] for each in record["steps"]} == {
        f"{p.step.kind}/{p.step.name}": p.step.fingerprint for p in planned.steps
    }
    assert record["plan"]["tokens"] == 4 * 8 * 32
    assert step.fingerprint[:16] in record["links"]["wandb"]
    page = record_markdown(place, record)
    assert "http://127.0.0.1/runs/1" in page
    assert all(f"| {each['step']} | `{each['fingerprint'][:16]}` |" in page for each in record["steps"])


def test_every_start_is_kept_and_a_run_that_is_only_taken_up_stays_as_recorded(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    for number in range(2):
        launch_record(planned, f"start {number}", {"id": str(number)})
    step = training_step(planned)
    assert step is not None
    record = read_record(step.directory(planned.root))
    assert record is not None
    assert [launch["flow_run"] for launch in record["launches"]] == [{"id": "0"}, {"id": "1"}]
    assert record["plan"]["dollars"] is None
    slices = launch_record(planned, "start 1", {}, Preflight.model_construct(hours=2.0, dollars=30.0))
    assert slices is not None
    assert (slices[1]["plan"]["seconds"], slices[1]["plan"]["dollars"]) == (7200.0, 30.0)
    record = slices[1]
    directory = Path(str(step.directory(planned.root)))
    directory.mkdir(parents=True)
    commit(directory, step, files=[], stats={})
    again = launch_record(plan(tmp_path), "start 2", {"id": "2"})
    assert again is not None
    assert again[1] == record == read_record(directory)


def test_nothing_is_recorded_where_nothing_is_trained(tmp_path: Path) -> None:
    config = plan(tmp_path).config
    planned = plan_run(config, tmp_path / "root", only="mixtures/")
    assert launch_record(planned, "", {}) is None
    assert not (tmp_path / "root" / "experiments").exists()


def test_a_damaged_record_is_named_and_the_next_start_writes_it_anew(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    written = launch_record(planned, "", {})
    assert written is not None
    place, _ = written
    Path(str(place)).write_text("{")
    step = training_step(planned)
    assert step is not None
    with pytest.raises(ValueError, match=r"is damaged .*: remove it"):
        read_record(step.directory(planned.root))
    launch_record(planned, "", {})
    assert read_record(step.directory(planned.root)) is not None


def test_a_record_lies_in_the_bucket_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "cache"))
    bucket = f"gs://{BUCKET}/record"
    with object_store() as url:
        use_store(monkeypatch, url)
        planned = plan(tmp_path, place_of(bucket))
        written = launch_record(planned, "", {})
        found = read_record(str(planned.wanted[-2].directory(planned.root)))
    assert written is not None
    place, record = written
    assert str(place).startswith(f"{bucket}/experiments/mine-")
    assert found == record


def test_the_state_of_the_code_has_the_diff_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("rate = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = code_state(tmp_path)
    assert (clean["dirty"], clean["diff"], clean["untracked"]) == (False, "", [])
    (tmp_path / "a.py").write_text(f"rate = 2\nkey = 'correct-horse-battery'\ntoken = '{HF_TOKEN}'\n")
    (tmp_path / "notes.txt").write_text("not read")
    state = code_state(tmp_path)
    assert state["commit"] == clean["commit"]
    assert state["dirty"]
    assert "+rate = 2" in state["diff"]
    assert state["untracked"] == ["notes.txt"]
    text = json.dumps(state)
    assert "correct-horse-battery" not in text
    assert HF_TOKEN not in text
    monkeypatch.setattr("tasks.source_control.LONGEST_DIFF", 20)
    cut = code_state(tmp_path)
    assert (len(cut["diff"]), cut["diff_cut"]) == (20, True)


def test_where_there_is_no_checkout_the_record_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    state = code_state(tmp_path)
    assert state["commit"] is None
    assert "not a git repository" in state["why"]
    monkeypatch.setenv("PATH", "")
    assert code_state(tmp_path) == {"commit": None, "why": "git is not installed"}


def test_a_long_name_keeps_what_tells_it_apart() -> None:
    assert tracker_name("short") == "short"
    names = [f"{'sweep-of-a-small-model-' * 4}lr{rate}" for rate in ("1e-3", "3e-4")]
    for most in (40, 64):
        cut = [tracker_name(name, most) for name in names]
        assert [len(name) for name in cut] == [most, most]
        assert cut[0].endswith("lr1e-3")
        assert cut[1].endswith("lr3e-4")
