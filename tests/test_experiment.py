"""Declaring runs: nothing heavy, nothing done, and every contradiction refused at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model.config import LlamaConfig
from model.train_config import SimpleTrainConfig
from tasks.config import TrainingStep
from tasks.datasets import shakespeare_mixture
from tasks.experiment import default_train, resolve_run, root_directory, root_place
from tasks.pipeline import label, run_steps
from tasks.places import ObjectPath
from tasks.presets import Preset, preset
from tasks.steps import Step

CHECKOUT = Path(__file__).resolve().parent.parent
TRAIN = SimpleTrainConfig(train_batch_size=4, num_train_steps=10, learning_rate=1e-3)
MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=1, num_heads=2, num_kv_heads=1)


def training(**changes: object) -> Step:
    return run_steps(default_train("mine", shakespeare_mixture(), MODEL, TRAIN.model_copy(update=changes))).training


def test_fields_that_do_not_change_the_result_are_no_identity() -> None:
    same = {"steps_per_log": 3, "steps_per_eval": 7, "steps_per_export": 9, "max_checkpoints": 1, "per_device_parallelism": 2}
    assert training(**same, accelerator_type="v4-128", tensor_parallel_size=2).fingerprint == training().fingerprint
    for name, value in {"learning_rate": 2e-3, "seed": 1, "z_loss_weight": 1e-4, "num_train_steps": 11, "beta2": 0.9}.items():
        assert training(**{name: value}).fingerprint != training().fingerprint, name


def test_tags_of_datasets_reach_the_trainer_and_are_no_identity() -> None:
    data = shakespeare_mixture()
    tagged = tuple(dataset.model_copy(update={"tags": (f"bard/{dataset.name}",)}) for dataset in data.datasets)
    steps = run_steps(default_train("mine", data.model_copy(update={"datasets": tagged}), MODEL, TRAIN))
    assert isinstance(steps.training.config, TrainingStep)
    assert steps.training.config.eval_tags == {"plays": ("bard/plays",), "sonnets": ("bard/sonnets",)}
    assert steps.training.fingerprint == training().fingerprint


def test_the_flow_takes_every_part_of_a_run() -> None:
    """What a run is made of and the flow's parameters cannot drift apart: a flag that is dropped would be a silent lie."""
    import inspect

    from flows.train import train_llama
    from tasks.config import RunConfig

    assert RunConfig.model_fields.keys() <= inspect.signature(train_llama.fn).parameters.keys()


def test_steps_come_after_their_inputs() -> None:
    steps = run_steps(preset("debug")).all
    names = [label(step) for step in steps]
    assert names == [
        "raw/plays",
        "raw/sonnets",
        "tokenizers/shakespeare",
        "tokens/plays",
        "tokens/sonnets",
        "mixtures/shakespeare",
        "checkpoints/debug",
        "hf/debug",
    ]
    for index, step in enumerate(steps):
        assert all(upstream in steps[:index] for upstream in step.upstream)


def test_a_preset_with_changes() -> None:
    run = resolve_run("debug", num_train_steps=7, seed=3, name="other", track=["wandb"])
    assert (run.name, run.train.num_train_steps, run.train.seed, run.track) == ("other", 7, 3, ("wandb",))
    assert run.train.learning_rate == preset("debug").train.learning_rate
    assert resolve_run("debug", train=TRAIN, learning_rate=0.5).train == TRAIN.model_copy(update={"learning_rate": 0.5})
    assert (resolve_run("debug", pool="tpu").pool, resolve_run("debug", pool="inline").pool) == ("tpu", None)


@pytest.mark.parametrize("name", list(Preset))
def test_every_preset_is_whole(name: str) -> None:
    run = preset(name)
    assert run.train.warmup_steps < run.train.num_train_steps
    assert run.data.weights


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'debgu' \(did you mean 'debug'\?\)"):
        preset("debgu")
    with pytest.raises(ValueError, match=r"train.train_seq_len=128 is longer than model.seq_len=64"):
        default_train("mine", shakespeare_mixture(), MODEL, TRAIN.model_copy(update={"train_seq_len": 128}))
    with pytest.raises(ValueError, match="name"):
        default_train("../up", shakespeare_mixture(), MODEL, TRAIN)
    with pytest.raises(ValueError, match=r"no field 'num_steps' \(did you mean 'num_train_steps'\?\)"):
        SimpleTrainConfig(train_batch_size=1, num_steps=3, num_train_steps=3, learning_rate=1.0)  # pyright: ignore


def test_where_artifacts_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_LLAMA_ROOT", str(tmp_path))
    assert root_directory(None) == tmp_path
    assert root_directory("/elsewhere") == Path("/elsewhere")
    monkeypatch.delenv("PREFECT_LLAMA_ROOT")
    assert root_directory(None) == Path.cwd() / "artifacts"
    assert root_place("gs://bucket/x") == ObjectPath("bucket", "x")
    with pytest.raises(ValueError, match=r"--root=gs://bucket/x: this works in a directory only"):
        root_directory("gs://bucket/x")
    with pytest.raises(ValueError, match=r"--root=s3://bucket/x: .* give one of these"):
        root_place("s3://bucket/x")


def test_an_experiment_file_plans_without_anything_heavy(tmp_path: Path) -> None:
    experiment = tmp_path / "exp1_small.py"
    experiment.write_text(
        "import sys\n"
        "from flows.train import SimpleTrainConfig, default_train, executor_main\n"
        "from model.config import LlamaConfig\n"
        "from tasks.datasets import shakespeare_mixture\n"
        "model = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=1, num_heads=2, num_kv_heads=1,\n"
        "                    use_flash_attention=True)\n"
        "train = SimpleTrainConfig(train_batch_size=4, num_train_steps=10, learning_rate=1e-3, min_lr_ratio=0.1, warmup=0.1)\n"
        "run = default_train(name='small', tokenized=shakespeare_mixture(), model_config=model, train_config=train, tags=['HOWTO'])\n"
        "assert not {'jax', 'tensorflow', 'seqio'} & sys.modules.keys()\n"
        "if __name__ == '__main__':\n"
        "    executor_main(steps=[run], description='a small one')\n"
    )
    command = [sys.executable, str(experiment), "--plan", "--root", str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0, done.stderr
    assert "checkpoints/small" in done.stdout


@pytest.mark.slow
def test_without_held_out_text_and_with_a_padded_vocabulary(tmp_path: Path) -> None:
    """Both are allowed, so both must end well: no evaluation, and samples of ids that the tokenizer has."""
    experiment = tmp_path / "exp2_padded.py"
    experiment.write_text(
        "from flows.train import SimpleTrainConfig, default_train, executor_main\n"
        "from model.config import LlamaConfig\n"
        "from tasks.datasets import Dataset, Mixture\n"
        "sonnets = Dataset(name='sonnets', source='package:shakespeare/sonnets/*.txt', document='paragraph', min_document_bytes=500)\n"
        "run = default_train('padded', Mixture(name='padded', datasets=(sonnets,), weights={'sonnets': 1.0}),\n"
        "    LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=2304),\n"
        "    SimpleTrainConfig(train_batch_size=4, num_train_steps=4, learning_rate=1e-3, compute_dtype='float32'))\n"
        "if __name__ == '__main__':\n"
        "    executor_main(steps=[run])\n"
    )
    environment = {"PYTHONPATH": str(CHECKOUT), "PREFECT_HOME": str(tmp_path / "prefect"), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(experiment), "--root", str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no dataset has held-out documents" in done.stderr
    assert "Hugging Face directory" in done.stdout
