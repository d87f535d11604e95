"""Experiments' files run for real: on this machine, several at once, as deployments; and compiled for the slices they name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cpu_compiler import xla_flags
from tests.prefect_server import Prefect, prefect_server
from tests.tpu_pool import work_pools

CHECKOUT = Path(__file__).resolve().parent.parent
EXPERIMENTS = CHECKOUT / "flows" / "experiments"
SMALL = """
MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=1, num_heads=2, num_kv_heads=1)
TRAIN = SimpleTrainConfig(train_batch_size=8, num_train_steps=6, learning_rate=1e-3, compute_dtype="float32", sample_tokens=4,
                          max_eval_batches=1)
"""
pytestmark = pytest.mark.slow


def run(file: Path, *flags: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python FILE` from another directory, with a Prefect home of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(home / "prefect"), "XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu", "COLUMNS": "250"}
    environment |= {"PYTHONPATH": str(CHECKOUT), "NO_COLOR": "1", **variables}
    command = [sys.executable, str(file), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=file.parent, env=environment, timeout=570)


def changed(script: str, changes: dict[str, str]) -> str:
    """A script with some of its text replaced, all of which is there."""
    for old, new in changes.items():
        assert old in script, old
        script = script.replace(old, new)
    return script


def test_the_guides_script_trains_with_a_corpus_of_ones_own_and_a_smaller_model(tmp_path: Path) -> None:
    script = changed(
        (EXPERIMENTS / "exp1077_reproduce_dclm_1b1x.py").read_text(),
        {
            "from tasks.datasets import dclm_mixture_config_llama3": "from tasks.datasets import shakespeare_mixture",
            "dclm_mixture_config_llama3": "shakespeare_mixture()",
            "seq_len=2048": "seq_len=64",
            "hidden_dim=2048": "hidden_dim=32",
            "intermediate_dim=8192": "intermediate_dim=64",
            "num_heads=16": "num_heads=2",
            "num_kv_heads=16": "num_kv_heads=2",
            "num_layers=24": "num_layers=2",
            "int(28.8e9)": "8 * 256 * 2048",
            'accelerator_type="v4-128"': "accelerator_type=None",
            "train_batch_size=256": "train_batch_size=8",
            "warmup=5000": "warmup=2",
        },
    )
    (tmp_path / "exp1_guide.py").write_text(script)
    done = run(tmp_path / "exp1_guide.py", "--root", str(tmp_path / "root"), home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (trained,) = (tmp_path / "root" / "checkpoints").glob("dclm_1b_1x-*")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 8
    assert rows[-1]["train/loss"] < 8.0
    assert (trained / "hf" / "config.json").is_file()
    again = run(tmp_path / "exp1_guide.py", "--plan", "--root", str(tmp_path / "root"), home=tmp_path)
    assert len(re.findall(r"│ reuse ", again.stdout)) == 8, again.stdout


def test_runs_at_once_fail_alone_and_share_their_steps(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"words": "no key that is read"}\n')
    (tmp_path / "exp2_several.py").write_text(
        "from flows.train import *\nfrom tasks.datasets import Dataset, shakespeare_mixture\nmix = shakespeare_mixture()\n"
        + SMALL
        + "one = default_train('one', mix, MODEL, TRAIN)\n"
        "bad_set = Dataset(name='bad', source='bad.jsonl')\n"
        "bad_mix = {'name': 'bad_mix', 'datasets': (*mix.datasets, bad_set), 'weights': {'plays': 1.0, 'bad': 1.0}}\n"
        "bad = default_train('bad', mix.model_copy(update=bad_mix), MODEL, TRAIN)\n"
        "cool = {'num_anneal_training_tokens': 8 * 64 * 3, 'train_batch_size': 8, 'train': {'compute_dtype': 'float32'}}\n"
        "after_bad = anneal_after('after_bad', bad, dataset_config=mix, **cool)\n"
        "after_one = anneal_after('after_one', one, dataset_config=mix, **cool)\n"
        "executor_main(steps=[one, after_bad, after_one])\n"
    )
    done = run(tmp_path / "exp2_several.py", "--max-concurrent", "2", "--root", str(tmp_path / "root"), home=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: bad: " in done.stderr
    table = {row.split("│")[0].strip(): row for row in done.stdout.splitlines() if row.count("│") == 4}
    assert "done" in table["one"]
    assert "failed" in table["bad"]
    assert "tokenizers/bad_mix" in table["bad"]
    assert "it needs bad, which failed" in table["after_bad"]
    assert "done" in table["after_one"]
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "root" / "checkpoints").glob("[!.]*")} == {"one", "after_one"}
    assert len([*(tmp_path / "root" / "tokens").glob("plays-*")]) == 1
    (annealed,) = (tmp_path / "root" / "checkpoints").glob("after_one-*")
    steps = [json.loads(line)["step"] for line in (annealed / "metrics.jsonl").read_text().splitlines()]
    assert (steps[0] > 6, steps[-1]) == (True, 9)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home)) as prefect:
        prefect.start("worker", "start", "--pool", "local")
        yield prefect


def test_a_deployed_experiment_is_the_same_run(prefect: Prefect, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    file = tmp_path / "exp3_deployed.py"
    file.write_text(
        "from flows.train import *\nfrom tasks.datasets import ByteTokenizer, Reading\n"
        + SMALL
        + "texts = default_tokenize('texts', 'texts/*.txt', ByteTokenizer(), Reading(document='line'))\n"
        "executor_main(steps=[default_train('mine', texts, MODEL, TRAIN, tags=['own'])])\n"
    )
    root = str(prefect.home / "experiments")
    refused = run(file, "--deploy", "nowhere", "--root", root, home=tmp_path, PREFECT_API_URL=prefect.api)
    assert refused.returncode == 2
    assert "--deploy='nowhere': no such work pool (there are: local" in refused.stderr
    made = run(file, "--deploy", "local", "--root", root, home=tmp_path, PREFECT_API_URL=prefect.api)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "prefect deployment run train-llama/mine" in made.stdout
    prefect.run("deployment", "run", "train-llama/mine")
    finished = prefect.wait_for_last_run(1)
    assert finished["state"]["type"] == "COMPLETED", (prefect.home / "worker.log").read_text()[-5000:]
    assert {"own", "run:mine"} <= {*finished["tags"]}
    planned = run(file, "--plan", "--root", root, home=tmp_path)
    assert len(re.findall(r"│ reuse ", planned.stdout)) == 6, planned.stdout
    assert "│ run " not in planned.stdout


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("exp1077_reproduce_dclm_1b1x.py", ["2.14B parameters", "54931 steps", "28.8B", "64 chips", "hours", "$"]),
        ("exp1078_reproduce_dclm_7b1x.py", ["7.53B parameters", "33378 steps", "140B", "4 x v4-128", "hours", "$"]),
    ],
)
def test_the_reproductions_compile_ahead_for_their_slices(file: str, shown: list[str], tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    flags = ["--plan", "--root", str(tmp_path / "root"), "--model.gradient-checkpointing", "full", "--train.per-device-parallelism", "4"]
    done = run(EXPERIMENTS / file, *flags, home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in shown:
        assert text in done.stdout, done.stdout
