"""A small run as it lies on disk, trained for a few steps on real text, with its export; made in this process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from model.config import LlamaConfig
from model.durable import write_json
from model.export import export
from model.job import TrainingJob
from model.train_config import SimpleTrainConfig
from model.trainer import Trainer
from tasks.mixture import mix_body
from tasks.sources.local_files import PACKAGED_TEXTS
from tasks.tokenization import tokenize_body
from tests.small_run import SmallRun

STEPS = 12
MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=2, num_heads=2, num_kv_heads=1)
TRAIN = SimpleTrainConfig(
    train_batch_size=8,
    num_train_steps=STEPS,
    learning_rate=2e-2,
    compute_dtype="float32",
    z_loss_weight=1e-4,
    steps_per_export=STEPS // 2,
    steps_per_eval=STEPS,
    sample_prompts=(),
    ema_beta=0.5,  # the average is what is exported, so it has to be what a checkpoint gives
)


@dataclass(frozen=True)
class TrainedRun:
    """Where everything lies. `lines` are the documents of the text, held-out ones too."""

    root: Path
    directory: Path
    mixture: Path
    lines: list[str]

    @property
    def hf(self) -> Path:
        """The exported directory."""
        return self.directory / "hf"


@functools.cache
def trained_run() -> TrainedRun:
    """Tokenizes 240 lines of a play, trains on them, and exports the last checkpoint; once a process. Not to be changed."""
    place = Path(tempfile.mkdtemp(prefix="trained-run-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    text = (PACKAGED_TEXTS / "shakespeare" / "plays" / "macbeth.txt").read_text(encoding="utf-8")
    lines = [line for line in dict.fromkeys(text.splitlines()) if len(line) > 20][:240]
    run = SmallRun(place / "root", {"play.txt": lines})
    with patch("tasks.mixture.seqio_rates", lambda step, directory, inputs: step.config.stages[0]["shares"]):
        tokens = run.made(run.tokens, tokenize_body, *run.inputs)
        mixture = run.made(run.steps.mixture, mix_body, run.tokenizer, tokens, run.raw)
    directory = run.root / "checkpoints" / "mine-0123456789abcdef"
    directory.mkdir(parents=True)
    job = TrainingJob(
        name="mine", fingerprint="0123456789abcdef" * 4, directory=directory, mixture=Path(mixture.path), model=MODEL, train=TRAIN
    )
    write_json(directory / ".job.json", job.model_dump(mode="json"))
    assert Trainer(job).run()
    export(job, directory / "hf", "float32")
    return TrainedRun(run.root, directory, Path(mixture.path), lines)
