"""What a newcomer gets wrong: each mistake is answered before anything starts, in at most six lines, with what to do."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from prefect.exceptions import ObjectNotFound

from flows import generate, harness
from flows.command_line import named_errors, run_command
from flows.declaration_errors import mistake
from flows.executor import run_experiments
from model.train_config import SimpleTrainConfig
from tasks.experiment import default_train
from tasks.pool_training import pretrain_deployment
from tasks.presets import preset
from tasks.vocabularies import SentencePieceFile

CHECKOUT = Path(__file__).resolve().parent.parent
LINES = 6


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_LLAMA_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the variable of this name has it, when the library is imported
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def check_answer(command: Callable[[], int], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """The command ends with 2, wrote nothing but one short message with all of `words`, and left nothing behind."""
    assert command() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) <= LINES, said.err
    for word in words:
        assert word in said.err
    assert "Traceback" not in said.err
    assert "validation error" not in said.err
    assert "╭" not in said.err
    assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # what is not there
        ("debgu", "unknown preset or command 'debgu' (did you mean 'debug'?)"),
        ("docter", "did you mean 'doctor'?"),
        ("--train.num-train-step 5", "--train.num-train-step is no flag: did you mean --train.num-train-steps?"),
        ("--learning-rate 1e-3", "--learning-rate is no flag: did you mean --train.learning-rate?"),
        ("--lr 1e-3", "--lr is no flag: did you mean --train.learning-rate?"),
        ("--prefix here", "--prefix is no flag: did you mean --root?"),
        ("--dry_run", "--dry_run is no flag: did you mean --plan?"),
        ("--train.steps 5", "--train.steps is no flag: did you mean --train.num-train-steps?"),
        ("--seq-len 512", "did you mean --model.seq-len?"),
        ("--plan tiny", "'tiny' stands where no value is expected"),
        ("--train.optimizer adam", "'adam' is unknown (did you mean 'adamw'?): use one of adamw, muon, lion"),
        ("--train.lr-schedule wsd", "'wsd' is unknown: use one of cosine, linear"),
        ("--train.compute-dtype bf16", "(did you mean 'bfloat16'?)"),
        ("--track wandb,tensorboard", "'wandb,tensorboard' is unknown"),
        ("--only chekpoints", "--only='chekpoints' matches no step; the steps are raw/plays"),
        ("--force (", "is not a regular expression"),
        ("--text /nowhere/*.txt", "matches no file: there is no directory /nowhere; correct the path"),
        ("--train.initialize-from-hf /nowhere", "give the directory of a model"),
        # values of the wrong type, or out of bounds
        ("--train.num-train-steps abc", "--train.num-train-steps: 'abc' is no whole number"),
        ("--train.learning-rate fast", "--train.learning-rate: 'fast' is no number"),
        ("--train.num-train-steps", "--train.num-train-steps lacks its value: Optimizer steps."),
        ("--train.num-train-steps 0", "train.num_train_steps=0: give a number of at least 1"),
        ("--train.warmup -1", "train.warmup=-1.0: give a number of at least 0"),
        ("--train.beta1 1", "train.beta1=1.0: give a number below 1"),
        ("--data.tokenizer.vocab-size 5", "data.tokenizer.vocab_size=5: give a number of at least 300"),
        ("--train.train-batch-size -3", "train.train_batch_size=-3: a batch has at least one sequence"),
        ("--train.train-batch-size ten", "'ten' is no batch size: give a number, or STEP:SIZE for each stage"),
        ("--name my/run", "name='my/run': give what matches ^[A-Za-z0-9_-]"),
        # values that contradict each other or the machine
        ("--train.warmup 5000", "train.warmup=5000 steps is more than train.num_train_steps=240: use fewer"),
        ("--train.per-device-parallelism 5", "train.per_device_parallelism=5 does not divide"),
        ("--train.tensor-parallel-size 2", "does not divide the 1 device(s)"),
        ("--train.accelerator-type v4-127", "unknown TPU slice 'v4-127': did you mean v4-16, v4-32, v4-64, v4-128?"),
        ("--train.accelerator-type v4-127 --plan", "unknown TPU slice 'v4-127'"),
        ("--model.num-kv-heads 5", "num_heads=8 is not a multiple of num_kv_heads=5: make it one"),
        ("--model.vocab-size 1000", "model.vocab_size=1000 is smaller than the tokenizer's vocabulary of 2048: raise"),
        ("--train.train-seq-len 4096", "train.train_seq_len=4096 is longer than model.seq_len=256: lower the first or raise the second"),
        ("--model.hybrid-norm", "the model could not be exported: model.hybrid_norm=True has no place in a Hugging Face"),
        ("--model.attention-bias qkv --model.mlp-bias", "the model could not be exported: no Hugging Face model has"),
        ("--model.logit-soft-cap 30", "the model could not be exported: model.logit_soft_cap=30 has no place in a Hugging Face"),
        # places that cannot be reached
        ("--root s3://bucket", "artifacts lie in a directory or in gs://bucket/prefix; give one of these"),
        ("--text hf://datasets/org/name@main/*.parquet", "HF_HUB_OFFLINE is set: unset it"),
        # the other commands
        ("adopt data", "missing --step: What it is, as kind/name"),
        ("adopt data --step plays --provenance x", "--step='plays': give kind/name, such as raw/plays"),
        ("verify nowhere", "there is no directory"),
        ("rollback nowhere --to 4 --skip 5", "is no training run: give its directory"),
    ],
)
def test_a_mistake_on_the_command_line(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_answer(lambda: run_command(arguments.split()), capsys, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["run", "Once", "--temprature", "1"], "--temprature is no flag"), ([], "missing checkpoint"), (["run", "Once"], "run")],
)
def test_a_mistake_when_asking_for_text(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_answer(lambda: generate.main(arguments), capsys, words)


def test_a_mistake_when_asking_for_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    check_answer(lambda: harness.main(["run"]), capsys, "missing --tasks: Names of tasks or groups")


def test_a_disk_without_room(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 << 20, 1 << 20, 1 << 20))
    check_answer(lambda: run_command([]), capsys, "bytes free, this run needs about", "free some space, choose another --root")


def test_a_bucket_without_credentials(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # no metadata server is looked for
    remedy = "run `gcloud auth application-default login`"
    check_answer(
        lambda: run_command(["--root", "gs://some-bucket/runs"]), capsys, "no valid Google credentials for gs://some-bucket", remedy
    )


def test_a_tokenizer_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["mine.py"])
    base = preset("debug")
    data = base.data.model_copy(update={"tokenizer": SentencePieceFile(path=str(tmp_path / "nowhere.model"))})
    run = default_train(name="mine", tokenized=data, model_config=base.model, train_config=base.train)
    check_answer(lambda: run_experiments([run], "", ["--plan"]), capsys, "nowhere.model")


def test_a_key_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    train = preset("debug").train

    def declare() -> int:
        SimpleTrainConfig(**{**dict(train), "learningrate": 1e-3})
        return 0

    check_answer(lambda: named_errors(declare), capsys, "SimpleTrainConfig has no field 'learningrate' (did you mean 'learning_rate'?)")


SCRIPT = """
from flows.train import *
from tasks.datasets import shakespeare_mixture
mix, model = shakespeare_mixture(), LlamaConfig()

def train(**changed):
    return SimpleTrainConfig(**{"train_batch_size": 4, "num_train_steps": 12, "learning_rate": 1e-3, **changed})

"""


def run_script(line: str, directory: Path) -> list[str] | None:
    """What is said of the error that ends an experiment's file with `line` as its ninth."""
    (directory / "mine.py").write_text(SCRIPT + line + "\n")
    with pytest.raises(Exception) as ended:  # noqa: PT011  (any: what is made of it is asserted)
        runpy.run_path(str(directory / "mine.py"))
    return mistake(ended.value, ended.value.__traceback__)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("default_train('x' * 70, mix, model, train())", "mine.py:9: name='xxxxxx"),
        ("default_train('x', mix, 'llama', train())", "mine.py:9: model='llama': input should be a valid dictionary or instance of"),
        ("default_train('x', 'dclm', model, train())", "mine.py:9: tokenized='dclm': give a mixture, or what default_tokenize returned"),
        ("train(learning_rte=1)", "mine.py:7: SimpleTrainConfig has no field 'learning_rte' (did you mean 'learning_rate'?)"),
        ("train(learning_rate='fast')", "mine.py:7: train.learning_rate='fast': input should be a valid number"),
        ("train(beta1=2)", "mine.py:7: train.beta1=2: give a number below 1"),
        ("train(seed=-1, epsilon=-1, weight_decay=-1, warmup=-1, rewarmup=-1, steps_per_eval=-1, cycles=-1)", "and 2 more lines"),
        ("LlamaConfig(num_heads=3, num_kv_heads=2)", "mine.py:9: num_heads=3 is not a multiple of num_kv_heads=2: make it one"),
        ("anneal_after('a', default_train('b', mix, model, train()), batch=3)", "mine.py:9: AnnealConfig has no field 'batch'"),
    ],
)
def test_a_mistake_in_an_experiments_file(line: str, words: str, tmp_path: Path) -> None:
    said = run_script(line, tmp_path)
    assert said is not None
    assert len(said) <= LINES
    assert said[0].startswith("error: mine.py:")
    assert words in "\n".join(said)


@pytest.mark.parametrize("line", ["int('x')", "1 / 0", "raise ValueError('mine')", "default_train(nam='x')", "mix.nothing"])
def test_a_bug_in_an_experiments_file_keeps_its_traceback(line: str, tmp_path: Path) -> None:
    assert run_script(line, tmp_path) is None


def test_a_file_with_a_mistake_ends_as_a_command_line_does(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT + "train(beta1=2)\n")
    (tmp_path / "bug.py").write_text(SCRIPT + "int('x')\n")
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done, bug = (
        subprocess.run([sys.executable, tmp_path / file], capture_output=True, text=True, env=environment, timeout=120)
        for file in ("mine.py", "bug.py")
    )
    assert (done.returncode, done.stderr) == (2, "error: mine.py:7: train.beta1=2: give a number below 1.0\n")
    assert bug.returncode == 1
    assert bug.stderr.startswith("Traceback")


def test_what_is_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    base = preset("debug")
    for steps in (base, "mine", [base.train]):
        check_answer(lambda steps=steps: run_experiments(steps, "", []), capsys, "give it a list of what default_train")  # type: ignore[arg-type]


def test_a_zone_that_is_a_region(capsys: pytest.CaptureFixture[str]) -> None:
    from deployments.tpu.form import TPUVariables

    def declare() -> int:
        TPUVariables(provider="cloud", project="mine", zones=["us-central2"], image="image")
        return 0

    check_answer(lambda: named_errors(declare), capsys, "'us-central2' is no zone: write it like us-central2-b, a region and a letter")


def test_a_work_pool_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    class Client:
        def read_work_pool(self, name: str) -> None:
            raise ObjectNotFound(Exception(name))

        def read_work_pools(self) -> list[object]:
            return [namedtuple("pool", "name")("tpu")]

    def ask() -> int:
        pretrain_deployment(Client(), "tpus")  # type: ignore[arg-type]
        return 0

    check_answer(
        lambda: named_errors(ask), capsys, "pool='tpus': no such work pool (there are: tpu)", "prefect work-pool create --type tpu tpus"
    )


def test_a_warmup_of_all_steps_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--plan", "--train.warmup", "1"]) == 0
    said = capsys.readouterr().out
    assert "train.warmup=1 is a fraction: all 240 steps warm up" in said
    assert "above 1 it is steps, below 1 a fraction" in said
    assert run_command(["--plan", "--train.warmup", "0.99"]) == 0
    assert "is a fraction" not in capsys.readouterr().out
