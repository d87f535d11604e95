"""Real training processes for tests: a small job, alone or as several that `jax.distributed` joins."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from model.config import LlamaConfig
from model.job import TrainingJob
from model.metrics import read_json_lines
from model.train_config import SimpleTrainConfig
from model.vocabularies.vocabulary import Vocabulary
from tasks.datasets import SentencePieceTraining
from tasks.vocabulary import train_sentencepiece
from tests.cpu_compiler import xla_flags
from tests.synthetic_stores import write_mixture

CHECKOUT = Path(__file__).resolve().parent.parent
VOCAB = 512
STEPS = 24


def make_mixture(root: Path) -> Path:
    """A mixture artifact of two datasets with a SentencePiece tokenizer of its own."""
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
    """The job file of a run in `directory`; `changes` are fields of its SimpleTrainConfig."""
    train = {
        "train_batch_size": 4,
        "num_train_steps": STEPS,
        "learning_rate": 5e-3,
        "compute_dtype": "float32",
        "steps_per_eval": 12,
        "steps_per_export": 4,
        "max_checkpoints": 3,
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


def start(job: Path, *, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """One training process. On one core and device the float sums are in the same order every time."""
    variables = {**os.environ, "XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(CHECKOUT), **environment}
    command = ["taskset", "-c", "0", sys.executable, "-m", "model.training_process", str(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def start_together(job: Path, count: int) -> list[subprocess.Popen[str]]:
    """`count` processes of one run, a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(job, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(index)) for index in range(count)]


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    """Its exit status, its events and its standard error, once it ended."""
    out, err = process.communicate(timeout=300)
    return process.returncode, [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def read_until(process: subprocess.Popen[str], step: int) -> None:
    """Returns when it has said that it did `step`."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "progress" and event["step"] >= step:
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read() if process.stderr else ''}")


def losses(directory: Path) -> dict[int, tuple[Any, Any]]:
    """Training and held-out loss of each step of the curve."""
    return {row["step"]: (row.get("train/loss"), row.get("eval/loss")) for row in read_json_lines(directory / "metrics.jsonl")}
