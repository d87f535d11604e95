"""The training process under kill -9, SIGTERM, damage and bad numbers: it continues bit for bit, or says what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from model.job import TrainingJob
from model.metrics import read_json_lines
from model.requests import Request
from model.trainer import NonFiniteLoss, Trainer
from tests.cpu_compiler import xla_flags
from tests.training_processes import CHECKOUT, STEPS, finish, losses, make_mixture, read_until, start, write_job


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    status, events, err = finish(start(write_job(directory, mixture)))
    assert status == 0, err
    assert events[-1] == {"event": "done", "step": STEPS}
    return directory


def test_the_run_leaves_what_it_should(undisturbed: Path) -> None:
    rows = read_json_lines(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    expected = {"train/loss", "train/cross_entropy", "train/z_loss", "optim/learning_rate", "grad/norm/total", "goodput"}
    expected |= {f"throughput/{name}" for name in ("tokens_per_second", "mfu", "mfu_full_attention", "loading_time")}
    assert expected <= rows[0].keys()
    assert {"eval/loss", "eval/bpb", "eval/a/loss", "eval/b/loss", "eval/a/bpb"} <= rows[-1].keys()
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert rows[0]["optim/learning_rate"] == pytest.approx(5e-3)
    assert (undisturbed / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "plotly" in (undisturbed / "loss.html").read_text()[:2000]
    assert json.loads((undisturbed / "samples.jsonl").read_text().splitlines()[-1])["prompt"] == "abc"
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["16", "20", "24"]


@pytest.mark.slow
def test_killed_three_times_ends_bit_equal(mixture: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture)
    for step in (2, 7, 15):
        process = start(job)
        read_until(process, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
    status, events, err = finish(start(job))
    assert status == 0, err
    # At most one interval of 4 steps is lost.
    assert next(event for event in events if event["event"] == "start")["start_step"] >= 8
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()


def test_what_was_due_at_the_resume_step_is_made_up_for(mixture: Path, undisturbed: Path, tmp_path: Path) -> None:
    process = start(write_job(tmp_path / "run", mixture, steps_per_eval=1000))
    read_until(process, 5)
    process.terminate()
    stopped_at = finish(process)[1][-1]["step"]
    status, events, err = finish(start(write_job(tmp_path / "run", mixture, steps_per_eval=stopped_at)))
    assert status == 0, err
    assert next(event["step"] for event in events if event["event"] == "eval") == stopped_at
    rows = [row for row in read_json_lines(tmp_path / "run" / "metrics.jsonl") if row["step"] == stopped_at]
    assert len(rows) == 1
    assert rows[0]["train/loss"] == losses(undisturbed)[stopped_at][0]
    assert rows[0]["eval/loss"] > 0


def test_sigterm_saves_where_it_stands(mixture: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, steps_per_export=1000)
    process = start(job)
    read_until(process, 5)
    process.send_signal(signal.SIGTERM)
    status, events, _ = finish(process)
    assert status == 75
    assert events[-1]["event"] == "stopped"
    stopped_at = events[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(stopped_at)).is_dir()
    status, events, err = finish(start(job))
    assert status == 0, err
    assert next(event for event in events if event["event"] == "start")["start_step"] == stopped_at
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_resumed_run_compiles_nothing_that_it_compiled_before(mixture: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, num_train_steps=100_000, steps_per_export=100_000)
    compiled: list[set[str]] = []
    for _ in range(2):
        process = start(job, JAX_COMPILATION_CACHE_DIR="")
        read_until(process, 3)
        process.terminate()
        assert finish(process)[0] == 75
        compiled.append({path.name for path in (tmp_path / "run" / "compiled").glob("jit_*-cache")})
    assert any(name.startswith("jit_step-") for name in compiled[0])
    assert not any(name.startswith("jit_step-") for name in compiled[1] - compiled[0])


def test_a_touched_file_or_a_signal_saves_and_training_goes_on(mixture: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, num_train_steps=100_000, steps_per_export=100_000, steps_per_eval=100_000)
    process = start(job)
    read_until(process, 5)
    (tmp_path / "run" / "save-now").touch()
    first = saved_at(process)
    assert not (tmp_path / "run" / "save-now").exists()
    process.send_signal(signal.SIGUSR1)
    second = saved_at(process)
    assert second > first >= 5
    read_until(process, second + 2)
    process.terminate()
    assert finish(process)[0] == 75
    assert {str(second)} < {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}


@pytest.mark.slow
def test_the_clock_asks_for_checkpoints_of_which_two_stay(mixture: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, num_train_steps=100_000, steps_per_export=100_000, minutes_per_checkpoint=0.01)
    process = start(job)
    steps = [saved_at(process) for _ in range(4)]
    process.kill()
    process.wait()
    assert steps == sorted(set(steps))
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert str(steps[2]) in names  # the fourth may not be committed yet
    assert str(steps[0]) not in names


def saved_at(process: subprocess.Popen[str]) -> int:
    """The step of the next save that it starts."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "saving":
            return int(event["step"])
    raise AssertionError(f"ended without a save: {process.stderr.read() if process.stderr else ''}")


def test_it_dies_with_its_parent(mixture: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, num_train_steps=100_000)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'model.training_process', sys.argv[1]])"
    variables = {**os.environ, "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(CHECKOUT)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(job)], stdout=subprocess.PIPE, text=True, env=variables)
    read_until(parent, 2)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    pattern = str(job)
    while time.monotonic() < deadline:
        alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _mentions(path, pattern)]
        if not alive:
            return
        time.sleep(0.2)
    pytest.fail("the trainer outlived its parent")


def _mentions(path: Path, text: str) -> bool:
    try:
        return text in path.read_text()
    except OSError:
        return False


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_last_good_checkpoint(mixture: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, learning_rate=1e30, max_grad_norm=None, warmup=0)
    status, events, _ = finish(start(job))
    assert status == 1
    assert events[-1]["event"] == "error"
    assert "not finite" in events[-1]["message"]
    assert re.search(r"step \d+, rows \d+ to \d+ \(a \d", events[-1]["message"])
    assert "train.learning_rate" in events[-1]["message"]


def test_a_checkpoint_of_another_run_is_refused(mixture: Path, undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    job = write_job(tmp_path / "run", mixture, learning_rate=1e-3, steps_per_eval=7)
    job.write_text(job.read_text().replace("a" * 64, "b" * 64))
    status, events, _ = finish(start(job))
    assert status == 1
    assert "belongs to run aaaaaaaaaaaaaaaa" in events[-1]["message"]
    assert "train.learning_rate was 0.005, is 0.001." in events[-1]["message"]


def test_a_vocabulary_larger_than_the_model_is_refused(mixture: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture)
    job.write_text(job.read_text().replace('"vocab_size":null', '"vocab_size":100'))
    status, events, _ = finish(start(job))
    assert status == 1
    assert events[-1]["message"].startswith("model.vocab_size=100 is smaller than the tokenizer's vocabulary of 512")


def test_a_prompt_that_does_not_fit_is_refused_before_training(mixture: Path, tmp_path: Path) -> None:
    status, events, _ = finish(start(write_job(tmp_path / "run", mixture, sample_prompts=("zqxj" * 40,))))
    assert status == 1
    assert [event["event"] for event in events] == ["error"]
    assert "leaves no room to go on in model.seq_len=32: shorten it" in events[0]["message"]


@pytest.mark.slow
def test_samples_are_as_long_as_there_is_room(mixture: Path, tmp_path: Path) -> None:
    status, events, err = finish(start(write_job(tmp_path / "run", mixture, num_train_steps=1, sample_tokens=1000)))
    assert status == 0, err
    assert any(event["event"] == "samples" for event in events)


def test_the_norms_of_layers_and_the_memory_are_in_the_log(undisturbed: Path) -> None:
    row = read_json_lines(undisturbed / "metrics.jsonl")[-1]
    layers = [row[f"grad/norm/layers/wq/{layer}"] for layer in range(2)]
    others = [value for name, value in row.items() if name.startswith("grad/norm/") and name != "grad/norm/total"]
    assert all(layer > 0 for layer in layers)
    assert sum(value**2 for value in others) ** 0.5 == pytest.approx(row["grad/norm/total"], rel=1e-5)
    assert {"params/norm/total", "params/norm/embed", "host/memory_gib", "throughput/hook_time", "run_progress"} <= row.keys()


def test_a_batch_without_a_token_that_counts_is_named(mixture: Path, tmp_path: Path) -> None:
    job = TrainingJob.model_validate_json(write_job(tmp_path / "run", mixture, train_batch_size=8).read_text())
    trainer = Trainer(job)
    batch = trainer.feed.take()
    _, metrics = trainer.train_step(trainer.state, {**batch, "loss_weights": batch["loss_weights"] * 0})
    with pytest.raises(NonFiniteLoss, match=r"step 1, rows 0 to 7 .*: no token of this batch counts for the loss"):
        trainer._record(1, metrics)
    trainer.close()


@pytest.mark.parametrize("asked_after", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)])
def test_asked_to_stop_at_any_moment_it_saves_the_step_it_stops_at(mixture: Path, tmp_path: Path, asked_after: int) -> None:
    """The request comes while the metrics of a step are read: the first one, one after which something is due, and another."""
    path = write_job(tmp_path / "run", mixture, train_batch_size=8, steps_per_eval=4, steps_per_export=100)
    trainer = Trainer(TrainingJob.model_validate_json(path.read_text()))
    record = trainer._record

    def record_and_ask(step: int, metrics: Any) -> None:
        record(step, metrics)
        if step == asked_after:
            trainer.requests.ask(Request.STOP)

    trainer._record = record_and_ask
    assert not trainer.run()
    assert asked_after <= trainer.step <= asked_after + 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(trainer.step)]


@pytest.mark.slow
def test_held_out_loss_is_that_of_the_averaged_weights(mixture: Path, tmp_path: Path) -> None:
    """An average that hardly moves has the loss of the first weights, whatever the weights themselves have learnt."""

    def held_out(name: str, **changes: Any) -> list[float]:
        job = write_job(tmp_path / name, mixture, num_train_steps=12, steps_per_eval=4, steps_per_export=12, learning_rate=0.05, **changes)
        finish(start(job))
        return [row["eval/loss"] for row in read_json_lines(tmp_path / name / "metrics.jsonl") if "eval/loss" in row]

    plain, averaged = held_out("plain"), held_out("averaged", ema_beta=0.99999)
    assert plain[0] - plain[-1] > 0.02
    assert max(averaged) - min(averaged) < 0.001


@pytest.mark.slow
def test_clipped_updates_are_in_the_log(mixture: Path, tmp_path: Path) -> None:
    finish(start(write_job(tmp_path, mixture, num_train_steps=2, steps_per_export=2, clip_update_norm=True)))
    row = read_json_lines(tmp_path / "metrics.jsonl")[-1]
    assert row["optim/clip_update/norm"] > 0
    assert 0 < row["optim/clip_update/scale"] <= 1
