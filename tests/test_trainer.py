"""The training process under kill -9, SIGTERM, damage and bad numbers: it continues bit for bit, or says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from model.config import LlamaConfig
from model.job import TrainingJob
from model.metrics import read_json_lines
from model.train_config import SimpleTrainConfig
from model.vocabularies.vocabulary import Vocabulary
from tasks.datasets import SentencePieceTraining
from tasks.vocabulary import train_sentencepiece
from tests.synthetic_stores import write_mixture

CHECKOUT = Path(__file__).resolve().parent.parent
VOCAB = 512
STEPS = 24


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    directory = Path(write_mixture(root, {"a": 0.7, "b": 0.3}, vocab_size=VOCAB).path)
    words = ("".join(chr(97 + (i * j) % 26) for j in range(1, 8)) for i in range(4000))
    model = train_sentencepiece(SentencePieceTraining(vocab_size=VOCAB), words)
    (root / "given.model").write_bytes(model)
    content = json.loads((directory / "mixture.json").read_text())
    vocabulary, tokenizer = Vocabulary.open(root / "given.model"), directory / content["tokenizer"]["path"]
    tokenizer.mkdir(parents=True)
    vocabulary.write(tokenizer)
    content["tokenizer"]["digest"] = vocabulary.digest
    (directory / "mixture.json").write_text(json.dumps(content))
    for store in root.glob("tokens/*/manifest.json"):
        text = store.read_text().replace("t" * 64, vocabulary.digest)
        store.write_text(text)
    return directory


def write_job(directory: Path, mixture: Path, **changes: Any) -> Path:
    train = {
        "train_batch_size": 4,
        "num_train_steps": STEPS,
        "learning_rate": 5e-3,
        "compute_dtype": "float32",
        "steps_per_eval": 12,
        "steps_per_export": 4,
        "steps_per_log": 1,
        "steps_per_sample": 24,
        "sample_prompts": ("abc",),
        "sample_tokens": 5,
        **changes,
    }
    job = TrainingJob(
        name="run",
        fingerprint="a" * 64,
        directory=directory,
        mixture=mixture,
        model=LlamaConfig(seq_len=32, hidden_dim=32, intermediate_dim=64, num_layers=2, num_heads=2, num_kv_heads=1),
        train=SimpleTrainConfig(**train),
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".job.json"
    path.write_text(job.model_dump_json())
    return path


def start(job: Path, **environment: str) -> subprocess.Popen[str]:
    # One device and one core: float sums in the same order every time.
    variables = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(CHECKOUT), **environment}
    command = ["taskset", "-c", "0", sys.executable, "-m", "model.trainer", str(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def losses(directory: Path) -> dict[int, tuple[Any, Any]]:
    return {row["step"]: (row.get("train/loss"), row.get("eval/loss")) for row in read_json_lines(directory / "metrics.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    status, events, err = finish(start(write_job(directory, mixture)))
    assert status == 0, err
    assert events[-1] == {"event": "done", "step": STEPS}
    return directory


def read_until(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "progress" and event["step"] >= step:
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read() if process.stderr else ''}")


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


def test_it_dies_with_its_parent(mixture: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "run", mixture, num_train_steps=100_000)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'model.trainer', sys.argv[1]])"
    variables = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(CHECKOUT)}
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
    assert "train.learning_rate" in events[-1]["message"]


def test_a_checkpoint_of_another_run_is_refused(mixture: Path, undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    job = write_job(tmp_path / "run", mixture)
    job.write_text(job.read_text().replace("a" * 64, "b" * 64))
    status, events, _ = finish(start(job))
    assert status == 1
    assert "belongs to run aaaaaaaaaaaaaaaa" in events[-1]["message"]


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


def test_samples_are_as_long_as_there_is_room(mixture: Path, tmp_path: Path) -> None:
    status, events, err = finish(start(write_job(tmp_path / "run", mixture, num_train_steps=1, sample_tokens=1000)))
    assert status == 0, err
    assert any(event["event"] == "samples" for event in events)
