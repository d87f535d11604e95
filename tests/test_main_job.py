"""The whole main job under kills, Ctrl-C, damage, a second run, changes, and a twin: it ends bit-equal, or says why not."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.main_job import STEPS, MainJob, assert_gone, assert_same_outcome, checkpoint_directory

ALL = (
    "raw plays",
    "raw sonnets",
    "tokenizers shakespeare",
    "tokens plays",
    "tokens sonnets",
    "mixtures shakespeare",
    "checkpoints job",
    "hf job",
)
DATA = ALL[:6]
# What it says when it is in the download, the tokenization, the training.
STAGES = ("raw plays runs", "tokens plays runs", "checkpoints job runs", f"step 1/{STEPS}")
GOES_ON = "run the same command again"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """The artifacts of an undisturbed run; nobody writes into them."""
    root = tmp_path_factory.mktemp("finished") / "root"
    MainJob(root, home).succeed()
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def untrained(copy: Path) -> Path:
    """The data of a finished run, without its training."""
    shutil.rmtree(copy / "checkpoints")
    return copy


def cached(output: str) -> tuple[str, ...]:
    return tuple(name for name in ALL if f"'{name}' - Finished in state Cached" in output)


def ran(output: str) -> tuple[str, ...]:
    return tuple(name for name in ALL if f"'{name}' - Finished in state Completed" in output)


def test_the_run_shows_what_came_out_and_leaves_it(finished: Path) -> None:
    directory = checkpoint_directory(finished)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["25", "30"]
    for name in ("metrics.jsonl", "samples.jsonl", "loss.png", "loss.html", "hf/config.json", "hf/model.safetensors"):
        assert (directory / name).stat().st_size > 0


def disturbed(root: Path, home: Path, kills: int) -> None:
    """Runs until it ends, killing it `kills` times on the way: the whole tree and the flow alone in turn."""
    seed = time.time_ns() % 1_000_000
    print(f"seed of the kills: {seed}")
    chance = random.Random(seed)
    for number in range(kills):
        job = MainJob(root, home)
        stage = STAGES[1 + number] if kills == 3 else chance.choice(STAGES)
        deadline = time.monotonic() + 100
        while stage not in job.output and job.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 4))
        job.kill(tree=number % 2 == 0)
    MainJob(root, home).succeed()


def test_killed_at_random_moments_it_ends_bit_equal(finished: Path, home: Path, tmp_path: Path) -> None:
    disturbed(tmp_path / "root", home, 3)
    assert_same_outcome(tmp_path / "root", finished)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times_it_ends_bit_equal(finished: Path, home: Path, tmp_path: Path) -> None:
    disturbed(tmp_path / "root", home, 20)
    assert_same_outcome(tmp_path / "root", finished)


def saved_step(output: str) -> int:
    found = re.search(rf"saved at step (\d+) of {STEPS}: {GOES_ON}", output)
    assert found, output
    return int(found.group(1))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [MainJob.interrupt, lambda job: job.process.terminate()])
def test_asked_to_stop_in_training_it_saves_and_continues_there(
    stop: Callable[[MainJob], None], untrained: Path, finished: Path, home: Path
) -> None:
    job = MainJob(untrained, home)
    job.until(STAGES[-1])
    below = job.children()
    stop(job)
    assert job.status() == 130, job.output
    assert "Traceback" not in job.output
    assert job.output.count("stopped: ") == 1
    assert GOES_ON in job.output.partition("stopped: ")[2]
    assert_gone(below)
    step = saved_step(job.output)
    assert (checkpoint_directory(untrained) / "checkpoints" / str(step)).is_dir()
    assert f"resuming from the checkpoint of step {step}, verified" in MainJob(untrained, home).succeed()
    assert_same_outcome(untrained, finished)


@pytest.mark.parametrize("stop", [MainJob.interrupt, lambda job: job.process.terminate()])
@pytest.mark.slow
def test_asked_to_stop_in_tokenization_it_stops(stop: Callable[[MainJob], None], finished: Path, home: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for kind in ("raw", "tokenizers"):
        shutil.copytree(finished / kind, root / kind)
    job = MainJob(root, home)
    job.until("tokens plays runs")
    below = job.children()
    stop(job)
    assert job.status() == 130, job.output
    assert "Traceback" not in job.output
    assert GOES_ON in job.output.partition("stopped: ")[2]
    assert_gone(below)
    assert not list(root.glob("tokens/*/manifest.json"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def victims(root: Path) -> list[Path]:
    """One file of every artifact, and of the training artifact one of every kind."""
    job = checkpoint_directory(root)
    arrays = max((job / "checkpoints" / str(STEPS) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    patterns = (
        *("raw/plays-*/files/hamlet.txt", "raw/sonnets-*/files/*.txt", "tokenizers/*/tokenizer.model"),
        *("tokens/plays-*/train/shard-00003-*/tokens.bin", "mixtures/*/mixture.json"),
    )
    data = [path for pattern in patterns for path in root.glob(pattern)]
    return [*data, arrays, job / "metrics.jsonl", job / "samples.jsonl", job / "loss.png", job / "hf" / "model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("injury", [flip, empty, Path.unlink])
def test_damaged_files_are_named_and_made_again(injury: Callable[[Path], None], copy: Path, finished: Path, home: Path) -> None:
    hurt = victims(copy)
    assert len(hurt) == 10
    for path in hurt:
        injury(path)
    output = MainJob(copy, home).succeed()
    for path in hurt:
        assert path.name in output, output
    assert "checkpoint 30 is not used" in output
    assert "resuming from the checkpoint of step 25, verified" in output
    assert cached(output) == ("tokens sonnets",)
    assert_same_outcome(copy, finished)
    for path in hurt[:5]:
        assert path.read_bytes() == (finished / path.relative_to(copy)).read_bytes()


@pytest.mark.slow
def test_a_curve_lost_in_an_unfinished_run_comes_back(untrained: Path, finished: Path, home: Path) -> None:
    job = MainJob(untrained, home)
    job.until(STAGES[-1])
    job.interrupt()
    assert job.status() == 130, job.output
    (checkpoint_directory(untrained) / "metrics.jsonl").unlink()
    assert "metrics.jsonl lacks rows or has others than were written: restored" in MainJob(untrained, home).succeed()
    assert_same_outcome(untrained, finished)


def test_a_second_run_reuses_every_step_and_says_so(finished: Path, home: Path) -> None:
    began = time.time()
    output = MainJob(finished, home).succeed()
    assert "8 step(s) reused, 0 to run" in output
    assert cached(output) == ALL
    changed = [path for path in finished.rglob("*") if path.is_file() and ".leases" not in path.parts and path.stat().st_mtime > began]
    assert not changed


@pytest.mark.slow
def test_what_does_not_decide_the_result_reuses_all_but_the_forced_step(copy: Path, finished: Path, home: Path) -> None:
    output = MainJob(copy, home, "--train.steps-per-log", "7", "--track", "tensorboard", "--force", "hf").succeed()
    assert cached(output) == ALL[:7]
    assert ran(output) == ("hf job",)
    assert_same_outcome(copy, finished)


@pytest.mark.slow
def test_another_learning_rate_trains_again_and_nothing_else(copy: Path, home: Path) -> None:
    output = MainJob(copy, home, "--train.learning-rate", "1e-3").succeed()
    assert cached(output) == DATA
    assert ran(output) == ("checkpoints job", "hf job")
    assert "train.learning_rate: 0.003 -> 0.001" in output
    assert len(list((copy / "checkpoints").glob("job-*/manifest.json"))) == 2


@pytest.mark.slow
def test_only_mixtures_trains_nothing(untrained: Path, home: Path) -> None:
    output = MainJob(untrained, home, "--only", "mixtures").succeed()
    assert cached(output) == DATA
    assert not (untrained / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("homes", [1, 2])
def test_of_two_at_once_one_trains_and_the_other_reuses(homes: int, untrained: Path, finished: Path, tmp_path: Path) -> None:
    # New homes: both make the server's database at the same moment.
    jobs = [MainJob(untrained, tmp_path / f"prefect-{number % homes}") for number in range(2)]
    outputs = [job.succeed() for job in jobs]
    for output in outputs:
        assert "database is locked" not in output
        assert "Traceback" not in output
    assert sorted("checkpoints job" in ran(output) for output in outputs) == [False, True]
    assert sum("resuming" in output for output in outputs) == 0
    assert any("waiting for" in output for output in outputs)
    assert_same_outcome(untrained, finished)


@pytest.mark.slow
def test_a_trainer_killed_for_its_memory_fails_the_run_and_says_so(untrained: Path, home: Path) -> None:
    job = MainJob(untrained, home)
    job.until("step 1/")
    trainer = job.child("model.training_process")
    assert trainer is not None
    os.kill(trainer, signal.SIGKILL)
    assert job.status() == 1, job.output
    assert "killed by the system, most often for using too much memory: use a smaller model, batch or sequence" in job.output
    assert "Traceback" not in job.output
    assert not (checkpoint_directory(untrained) / "manifest.json").exists()
