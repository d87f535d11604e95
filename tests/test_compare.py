"""Runs side by side: found by whatever names them, their numbers, what differs, and the plots."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from flows.compare import compare_llama
from model.comparison_plots import AXES, points
from model.config import LlamaConfig
from model.job import TrainingJob
from model.train_config import SimpleTrainConfig
from tasks import objects
from tasks.artifacts import commit
from tasks.compared_runs import differing_fields, find_runs, table
from tasks.comparison import Comparison, law_points, left_out
from tasks.datasets import shakespeare_mixture
from tasks.experiment import default_train
from tasks.pipeline import run_steps
from tasks.places import ObjectPath, Place, working_directory
from tasks.sweep_report import publish_table
from tasks.sweep_table import ArmRow, SweepTable
from tests.object_store import BUCKET, object_store, use_store

CHECKOUT = Path(__file__).resolve().parent.parent
MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=1, num_heads=2, num_kv_heads=1)


def rows(steps: int, loss: float) -> list[dict[str, Any]]:
    """One a step: 100 tokens, 2e9 FLOPs, 3.6 s; and 1.8 s in hooks with the evaluation of every second."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "train/loss": loss + steps - step,
            "throughput/total_tokens": 100.0 * step,
            "throughput/total_gflops": 2.0 * step,
            "throughput/duration": 3.6,
        }
        if step % 2 == 0:
            row |= {"eval/loss": loss + steps - step, "eval/bpb": 1.25, "throughput/hook_time": 1.8}
        found.append(row)
    return found


def write_run(
    root: Place, name: str, *, steps: int = 4, loss: float = 2.0, finished: bool = True, origin: Any = None, **changes: Any
) -> Place:
    """A run as the training step leaves it, or as it is in the middle."""
    train = SimpleTrainConfig(**{"train_batch_size": 4, "num_train_steps": steps, "learning_rate": 1e-3, **changes})
    step = run_steps(default_train(name, shakespeare_mixture(), MODEL, train)).training
    if origin is not None:
        step = replace(step, config=step.config.model_copy(update={"initial_weights": "0" * 64}))
    place = step.directory(root)
    directory = working_directory(place)
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(steps, loss)))
    mixture = directory.parent / "x-0"
    job = TrainingJob(name=name, fingerprint=step.fingerprint, directory=directory, mixture=mixture, model=MODEL, train=train)
    (directory / ".job.json").write_text(job.model_dump_json())
    if finished:
        commit(
            place, step, files=[directory / "metrics.jsonl"], stats={"step": steps, "num_parameters": 12_345, "final": {}, "origin": origin}
        )
    return place


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path, "slow", loss=3.0)
    write_run(tmp_path, "fast", loss=2.0, learning_rate=2e-3)
    write_run(tmp_path, "stopped", loss=2.5, finished=False)
    return tmp_path


def test_runs_are_found_by_whatever_names_them(root: Path) -> None:
    one = next((root / "checkpoints").glob("slow-*"))
    sweep = root / "sweeps" / "s-1" / "sweep.json"
    sweep.parent.mkdir(parents=True)
    sweep.write_text(json.dumps({"rows": [{"place": str(one)}, {"place": str(root / "checkpoints" / "waiting-0")}]}))
    names = {
        str(one): ["slow"],
        str(root): ["fast", "slow", "stopped"],
        str(root / "checkpoints"): ["fast", "slow", "stopped"],
        f"{root}/checkpoints/s*": ["slow", "stopped"],
        str(sweep): ["slow"],
        str(sweep.parent): ["slow"],
    }
    for word, expected in names.items():
        assert [run.name for run in find_runs([word])] == expected, word
    assert len(find_runs([str(one), str(root)])) == 3  # each once
    for word in ("nowhere", str(root / "raw"), f"{root}/checkpoints/x*"):
        with pytest.raises(ValueError, match="no run with a loss here"):
            find_runs([word])


def test_the_table(root: Path) -> None:
    columns, lines = table(find_runs([str(root)]))
    assert columns[:8] == ("run", "parameters", "tokens", "FLOPs", "hours", "train loss", "held-out loss", "bits per byte")
    assert [line[0] for line in lines] == ["fast", "stopped (step 4, not finished)", "slow"]
    assert lines[0][1:8] == ("12.3k", "400", "8 GFLOP", "0.005", "2.0000", "2.0000", "1.2500")
    assert dict(zip(columns, lines[0], strict=True))["train.learning_rate"] == "0.002"
    finished = [run for run in find_runs([str(root)]) if run.finished]
    assert differing_fields(finished) == ["train.learning_rate"]


def test_a_run_that_goes_on_is_told_and_left_out_of_a_law(tmp_path: Path) -> None:
    write_run(tmp_path, "later", origin={"step": 3, "row": 0, "tokens": 300})
    write_run(tmp_path, "anew")
    comparison = Comparison.of([str(tmp_path)], fit=False)
    later = next(run for run in comparison.runs if run.name == "later")
    assert (later.begins_at, later.anew, later.tokens) == (3, False, 400)
    assert sorted(line[0] for line in comparison.table()[1]) == ["anew", "later (after step 3)"]
    assert [point.name for point in law_points(comparison.runs)] == ["anew"]
    assert left_out(comparison.runs) == ["not in the law, because they go on from other weights: later"]


def test_runs_of_one_name_are_told_apart(root: Path) -> None:
    write_run(root, "fast", steps=6)
    names = [run.name for run in find_runs([str(root)])]
    assert len(set(names)) == len(names) == 4
    assert sum(name.startswith("fast-") for name in names) == 2


def test_each_axis_of_the_plot_has_its_units(root: Path) -> None:
    (run,) = find_runs([f"{root}/checkpoints/fast-*"])
    curve = run.curve()
    ends = {axis: curve.along[axis][-1] for axis in AXES}
    assert ends == {"steps": 4.0, "tokens": 400.0, "FLOPs": 8e9, "hours": pytest.approx(0.005)}
    assert points(curve, "tokens", curve.held_out) == ([200.0, 400.0], [4.0, 2.0])


def test_plots_and_numbers_are_written_and_open_offline(root: Path, tmp_path: Path) -> None:
    for number, steps in enumerate((5, 6, 8)):
        write_run(root, f"ladder-{number}", steps=steps, loss=2 + 10 / steps)
    out = tmp_path / "out"
    comparison = Comparison.of([f"{root}/checkpoints/ladder-*"], fit=True)
    files = comparison.save(out)
    assert {path.name for path in files} == {p.name for p in out.iterdir()}
    for name in ("comparison", "scaling-law"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        page = (out / f"{name}.html").read_text()
        assert "Plotly.newPlot" in page
        assert 'src="http' not in page
    numbers = json.loads((out / "comparison.json").read_text())
    assert [run["name"] for run in numbers["runs"]] == ["ladder-0", "ladder-1", "ladder-2"]
    assert numbers["scaling_law"]["law"] == "compute"
    assert comparison.law_lines()[0].startswith("law: L = ")


def test_finished_runs_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "here"))
    with object_store() as url:
        use_store(monkeypatch, url)
        bucket = ObjectPath(BUCKET, "team")
        place = write_run(bucket, "far", steps=2)
        write_run(bucket, "farther", steps=2, seed=1)
        objects.write(bucket / "sweeps/far-0/sweep.json", json.dumps({"rows": [{"place": str(place)}]}).encode(), generation=None)
        monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "elsewhere"))
        words = {str(place): ["far"], str(bucket): ["far", "farther"], f"{bucket}/checkpoints/farth*": ["farther"]}
        words[f"{bucket}/sweeps/far-0"] = ["far"]
        for word, names in words.items():
            runs = find_runs([word])
            assert [run.name for run in runs] == names, word
            assert runs[0].tokens == 200.0
        with pytest.raises(ValueError, match="no run with a loss here"):
            find_runs([f"{bucket}/checkpoints/x*"])


@pytest.mark.slow
def test_the_artifacts_of_the_flows(root: Path, tmp_path: Path) -> None:
    for number, steps in enumerate((5, 6, 8)):
        write_run(root, f"ladder-{number}", steps=steps, loss=2 + 10 / steps)
    rows = [ArmRow(name="a", values={"train.seed": "1"}, fingerprint="f", place="p", state="finished", outcome={"eval/loss": 2.0})]

    @flow
    def publish() -> None:
        publish_table(SweepTable(name="Mine", place="p", rows=rows))

    with prefect_test_harness(server_startup_timeout=120):
        publish()
        files = compare_llama([f"{root}/checkpoints/ladder-*"], fit=True, out=str(tmp_path / "out"))
        with get_client(sync_client=True) as client:
            artifacts = {each.key: str(each.data) for each in client.read_artifacts()}
    assert len(files) == 5
    expected = {
        "compared-runs",
        "comparison",
        "comparison-page",
        "scaling-law",
        "scaling-law-page",
        "scaling-law-numbers",
        "sweep-mine",
        "sweep-mine-summary",
    }
    assert expected <= artifacts.keys()
    assert "ladder-1" in artifacts["compared-runs"]
    for key in ("comparison", "scaling-law"):
        assert artifacts[key].startswith("data:image/png;base64,")
    assert "root mean square error" in artifacts["scaling-law-numbers"]
    assert '"held-out loss": "2.0000"' in artifacts["sweep-mine"]


def test_the_command(root: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "flows" / "compare.py"), str(root), "--fit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 2 finished run(s) with a held-out loss do not decide E, A and alpha")
    assert "Traceback" not in done.stderr


def test_the_flow_has_a_form(tmp_path: Path) -> None:
    properties = compare_llama.parameters.properties
    assert compare_llama.name == "compare-llama"
    assert all(field.get("description") for field in properties.values())
    assert properties["law"]["enum"] == ["auto", "parameters-and-tokens", "compute"]
