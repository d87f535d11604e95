"""Preflight in a plan and before a run, with compilations that lie on disk already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model import child
from model.batch_arithmetic import BatchArithmetic
from model.preflight import cache
from model.preflight.compiler import Compiled
from model.preflight.facts import CompileOrder, CompileOutcome
from model.preflight.result import Preflight
from model.preflight.search import Search
from model.preflight.settings import Fixed, Job, replace_train
from model.slices import slice_named
from model.train_config import SimpleTrainConfig
from tasks import preflight as preflight_task
from tasks.artifacts import Artifact
from tasks.config import RunConfig
from tasks.pipeline import run_steps
from tasks.planning import plan_run
from tasks.preflight import (
    DoesNotFit,
    as_chosen,
    check_accelerator,
    preflight,
    preflight_lines,
    refuse_what_does_not_fit,
    without_chosen_options,
)
from tasks.presets import preset
from tests.preflight_facts import compiled_as_estimated

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))


def on_slice(accelerator_type: str = "v4-8", **train: Any) -> RunConfig:
    """The debug run, on a TPU slice."""
    run = preset("debug")
    return run.model_copy(update={"train": SimpleTrainConfig(**{**dict(run.train), "accelerator_type": accelerator_type, **train})})


def job_of(run: RunConfig, root: Path) -> Job:
    return Job(name=run.name, model=plan_run(run, root).model, train=run.train)


def fill_cache(job: Job, memory: float = 1.0) -> Search:
    """Puts on disk all that a preflight of the job will ask the compiler for."""

    def compiled(_: str, order: CompileOrder) -> Compiled:
        outcome = CompileOutcome(facts=compiled_as_estimated(order, memory=memory))
        cache.store(order, outcome)
        return Compiled(outcome, from_cache=False)

    assert job.train.accelerator_type is not None
    tpu_slice = slice_named(job.train.accelerator_type)
    search = Search(job, tpu_slice, compiled)
    search.run(Fixed.of(job, tpu_slice.num_chips))
    return search


def command(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PREFECT_API_URL")}
    variables |= {"PREFECT_LLAMA_ROOT": str(root), "NO_COLOR": "1", "COLUMNS": "200"}
    line = [sys.executable, str(CHECKOUT / "flows" / "train.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=variables, cwd=root, timeout=120)


def test_a_job_travels_to_the_command_and_its_result_back(tmp_path: Path) -> None:
    run = on_slice()
    job = job_of(run, tmp_path)
    search = fill_cache(job)
    told: list[str] = []
    found = preflight(job.name, job.model, job.train, tell=told.append)
    assert found is not None
    assert found.fits
    assert (found.job, found.accelerator, found.num_chips) == ("debug", "v4-8", 4)
    assert all(trial.from_cache for trial in found.trials)
    assert len(found.trials) == len(search.trials)
    assert told == []
    refuse_what_does_not_fit(found)
    lines = preflight_lines(found)
    assert lines[0].startswith("slice: v4-8 (4 chips, 1 hosts): fits")
    assert any("list price" in line and "as of" in line for line in lines)


@pytest.mark.slow
def test_what_was_chosen_is_found_on_disk_when_it_is_asked_for_again(tmp_path: Path) -> None:
    job = job_of(on_slice(), tmp_path)
    fill_cache(job)
    found = preflight(job.name, job.model, job.train, tell=lambda line: None)
    assert found is not None
    assert found.compiler_options
    model, train = as_chosen(found, job.model, job.train)
    again = preflight(job.name, model, without_chosen_options(train), tell=lambda line: None)
    assert again is not None
    assert all(trial.from_cache for trial in again.trials)
    assert again.hours == found.hours
    own = replace_train(job, compiler_options={"xla_of_mine": "true"}).train
    assert without_chosen_options(own) == own


def test_plan_shows_it(tmp_path: Path) -> None:
    job = job_of(on_slice(), tmp_path)
    fill_cache(job)
    done = command("--plan", "--train.accelerator-type", "v4-8", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "v4-8 (4 chips, 1 hosts): fits" in done.stdout
    assert "remat" in done.stdout
    assert "per chip-hour" in done.stdout


def test_a_run_that_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    job = job_of(on_slice(), tmp_path)
    search = fill_cache(job, memory=1e5)
    assert search.best is None
    for flags in (("--plan",), ()):
        done = command(*flags, "--train.accelerator-type", "v4-8", root=tmp_path)
        assert done.returncode == 2
        assert "error: debug on v4-8 (4 chips, 1 hosts): does NOT fit" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_fits_is_refused_while_no_pool_has_slices(tmp_path: Path) -> None:
    fill_cache(job_of(on_slice(), tmp_path))
    done = command("--train.accelerator-type", "v4-8", root=tmp_path)
    assert done.returncode == 2
    assert "can be planned (--plan) but not run" in done.stderr


def test_what_no_compiler_is_needed_to_refuse(tmp_path: Path) -> None:
    job = job_of(on_slice("v4-128"), tmp_path)
    with pytest.raises(ValueError, match=r"preflight: train.train_batch_size=8 does not divide over 64 devices .*multiple of 64"):
        preflight(job.name, job.model, job.train, tell=lambda line: None)
    unknown = replace_train(job, accelerator_type="v4-127")
    with pytest.raises(ValueError, match="unknown TPU slice 'v4-127'"):
        preflight(job.name, job.model, unknown.train, tell=lambda line: None)


def test_a_machine_without_the_compiler_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(on_slice(), tmp_path)
    monkeypatch.setattr("model.preflight.topology.find_spec", lambda name: None)
    told: list[str] = []
    assert preflight(job.name, job.model, job.train, tell=told.append) is None
    assert told[0].startswith("preflight not done: libtpu is not installed")
    with pytest.raises(ValueError, match="can be planned"):
        check_accelerator(job.name, job.model, job.train, tell=told.append)


def test_nothing_happens_without_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_task, "preflight", lambda *_, **__: pytest.fail("a preflight"))
    run = preset("debug")
    check_accelerator(run.name, run.model, run.train, tell=lambda line: None)


def test_the_training_task_refuses_before_it_starts_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import training

    job = job_of(on_slice(), tmp_path)
    search = fill_cache(job, memory=1e5)
    assert search.best is None
    monkeypatch.setattr(training, "run_trainer", lambda *_, **__: pytest.fail("a trainer was started"))
    monkeypatch.setattr(training, "vocabulary_of", lambda mixture: 2048)
    step = run_steps(on_slice()).training
    mixture = Artifact(kind="mixtures", name="plays", path=str(tmp_path), fingerprint="0" * 64)
    with pytest.raises(DoesNotFit, match=r"debug on v4-8 .*does NOT fit.*remat"):
        training.train_body(step, tmp_path, (mixture,))
    assert not (tmp_path / ".job.json").exists()


def test_the_training_task_asks_with_the_vocabulary_of_the_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import training

    asked: list[int | None] = []
    monkeypatch.setattr(training, "check_accelerator", lambda name, model, train, tell, pool: asked.append(model.vocab_size))
    monkeypatch.setattr(training, "vocabulary_of", lambda mixture: 4321)
    mixture = Artifact(kind="mixtures", name="plays", path=str(tmp_path), fingerprint="0" * 64)
    given = training.training_job(run_steps(on_slice()).training, tmp_path, mixture)
    assert training.as_preflight_chose(given) == given
    assert asked == [4321]


def test_on_the_slice_itself_the_trainer_is_told_what_preflight_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import training

    run = on_slice("v5litepod-4")
    search = fill_cache(job_of(run, tmp_path))
    best = search.best
    assert best is not None
    monkeypatch.setattr("model.local_chips.local_chips", lambda: {"v5e": 4})
    monkeypatch.setattr(training, "vocabulary_of", lambda mixture: 2048)
    step = run_steps(run).training
    mixture = Artifact(kind="mixtures", name="plays", path=str(tmp_path), fingerprint="0" * 64)
    given = training.training_job(step, tmp_path, mixture)
    job = training.as_preflight_chose(given)
    assert job.model.remat == best.setting.remat
    assert job.train.compiler_options == best.flag_set.options != {}
    assert BatchArithmetic.of(job.train, 4).num_microbatches == best.setting.microbatches
    assert (job.train.context_parallel_size, job.train.tensor_parallel_size) == (best.setting.context, best.setting.tensor)
    # The same run to the cache: nothing of this is its identity.
    assert job.model.identity() == given.model.identity()
    assert job.train.identity() == given.train.identity()


def test_the_trainer_refuses_devices_that_are_not_the_slice() -> None:
    from model.training_process import check_devices

    train = on_slice("v5litepod-4").train
    with pytest.raises(ValueError, match=r"accelerator_type='v5litepod-4' is 4 chips of TPU v5e, and JAX sees 8 device\(s\) of kind 'cpu'"):
        check_devices(train)
    check_devices(train.model_copy(update={"accelerator_type": None}))


def test_an_error_of_the_command_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child, "CHECKOUT", tmp_path)
    package = tmp_path / "model" / "preflight"
    package.mkdir(parents=True)
    (tmp_path / "model" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys\nprint('half way', file=sys.stderr)\nsys.exit('error: the compiler broke')\n")
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    with pytest.raises(ValueError, match="preflight: the compiler broke"):
        preflight_task._run([], told.append)
    assert told == ["half way"]


def test_results_are_json(tmp_path: Path) -> None:
    from model.preflight.result import result_of

    result = result_of(fill_cache(job_of(on_slice(), tmp_path)), "on_demand")
    assert Preflight.model_validate(json.loads(result.model_dump_json())) == result
