"""What of an experiment's file cannot run is refused when it is planned, beside the runs that can."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import deploying
from flows.executor import run_experiments
from tasks.anneal import anneal_after
from tasks.config import RunConfig
from tasks.datasets import shakespeare_mixture
from tests.test_executor import TRAIN, run


def broken(name: str) -> RunConfig:
    """A run that is refused when it is planned."""
    train = TRAIN.model_copy(update={"initialize_from_hf": "/nowhere"})
    return run(name).model_copy(update={"train": train})


def test_a_run_that_is_refused_keeps_back_only_what_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = broken("bad")
    later = anneal_after("later", bad, dataset_config=shakespeare_mixture(), num_anneal_training_tokens=8 * 64 * 5, train_batch_size=8)
    runs = [run("one"), bad, later, run("two")]
    assert run_experiments(runs, "", ["--plan", "--root", str(tmp_path / "root")]) == 2
    said = capsys.readouterr()
    assert "checkpoints/one" in said.out
    assert "checkpoints/two" in said.out
    assert "error: bad: train.initialize_from_hf='/nowhere' has no config.json" in said.err
    assert "error: later: it needs bad, which was refused" in said.err
    ran: list[str] = []
    monkeypatch.setattr("flows.executor.prepare_prefect", lambda: None)
    monkeypatch.setattr("flows.executor.launch", lambda config, *_, **__: ran.append(config.name) or [])
    assert run_experiments(runs, "", ["--root", str(tmp_path / "root")]) == 1
    assert ran == ["one", "two"]
    table = capsys.readouterr().out
    for state in ("refused", "left out", "done"):
        assert state in table
    assert run_experiments([bad], "", ["--root", str(tmp_path / "root")]) == 2
    assert capsys.readouterr().err.startswith("error: train.initialize_from_hf")


def test_a_deployment_of_the_project_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(deploying, "deploy", lambda config, *_: made.append(config.name) or "")
    assert deploying.shipped_names() == {"train-llama", "tpu"}
    for name in ("tpu", "train-llama"):
        with pytest.raises(ValueError, match=rf"train-llama/{name} is a deployment of prefect.yaml, .* rename the run"):
            list(deploying.deploy_all([run("mine"), run(name)], "local", tmp_path))
    assert made == []
    assert len(list(deploying.deploy_all([run("mine")], "local", tmp_path))) == 1


def test_slices_of_no_type_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = TRAIN.model_copy(update={"slice_count": 4})
    sliced = run("sliced").model_copy(update={"train": train})
    assert run_experiments([sliced], "", ["--plan", "--root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "train.slice_count=4 has no effect without train.accelerator_type" in said
    assert run_experiments([sliced.model_copy(update={"pool": "tpu"})], "", ["--plan", "--root", str(tmp_path)]) == 0
