"""The command line as a person meets it: help, plan, mistakes, maintenance commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu_compiler import xla_flags

CHECKOUT = Path(__file__).resolve().parent.parent
HEAVY = ("jax", "tensorflow", "seqio", "flax", "orbax", "matplotlib", "plotly", "transformers", "torch")


TRAIN = CHECKOUT / "flows" / "train.py"


def run(*arguments: str, root: Path, cwd: Path | None = None, script: Path = TRAIN, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python flows/train.py ...`, or another script, with artifacts below `root`."""
    variables = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    variables |= {"XLA_FLAGS": xla_flags(), "PREFECT_LLAMA_ROOT": str(root), "NO_COLOR": "1", "COLUMNS": "200", **environment}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd or root, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["--plan"], ["tiny", "--help"]])
def test_nothing_heavy_is_imported(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, root=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic" in imported
    assert not imported & {*HEAVY, "prefect"}


def test_the_flow_module_itself_imports_nothing_heavy() -> None:
    code = f"import sys, flows.train; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_plan_says_what_would_run_and_what_it_amounts_to(tmp_path: Path) -> None:
    done = run("--plan", root=tmp_path)
    assert done.returncode == 0
    for word in ("parameters", "tokens", "FLOP", "sequences", "fsdp", "time", "checkpoints/debug", "first run of this step"):
        assert word in done.stdout
    assert not any(tmp_path.iterdir())


def test_changes_on_the_command_line_are_in_the_plan(tmp_path: Path) -> None:
    done = run("tiny", "--plan", "--train.num-train-steps", "7", "--model.num-layers", "3", root=tmp_path)
    assert "7 steps" in done.stdout
    assert "3 layers" in done.stdout


def test_a_batch_that_changes_is_in_the_plan(tmp_path: Path) -> None:
    done = run("tiny", "--plan", "--train.num-train-steps", "70", "--train.train-batch-size", "0:8", "50:16", root=tmp_path)
    assert "50 steps x 4.1k (8 sequences of 512) + 20 steps x 8.19k (16 sequences of 512)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debgu"], "unknown preset or command 'debgu' (did you mean 'debug'?)"),
        (["--train.num-train-steps", "0"], "train.num_train_steps=0: give a number of at least 1"),
        (["--text", "/nowhere/*.txt"], "matches no file"),
    ],
)
def test_a_mistake_ends_the_process_with_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, root=tmp_path)
    assert done.returncode == 2, done.stdout
    output = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert message in output
    assert "Traceback" not in output
    assert not any(tmp_path.iterdir())


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("x")
    done = run("--root", str(place), root=tmp_path)
    assert done.returncode == 2
    assert str(place) in done.stderr
    assert "Traceback" not in done.stderr


def test_text_of_ones_own(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("one line of text after another\n" * 4000)
    done = run("--plan", "--text", str(text), root=tmp_path / "root", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "raw/text" in done.stdout


def test_doctor(tmp_path: Path) -> None:
    done = run("doctor", root=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "packaged text" in done.stdout
    refused = run("doctor", root=tmp_path, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert refused.returncode == 1
    assert "does not answer" in refused.stdout


def test_adopt_and_verify(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("some text")
    root = tmp_path / "root"
    root.mkdir()
    adopted = run("adopt", str(data), "--step", "raw/mine", "--provenance", "written by hand", root=root)
    assert adopted.returncode == 0, adopted.stderr
    assert run("verify", str(data), root=root).returncode == 0
    (data / "a.txt").write_text("some texT")
    damaged = run("verify", str(data), root=root)
    assert damaged.returncode == 1
    assert "a.txt" in damaged.stdout
    assert run("verify", str(tmp_path / "nothing"), root=root).returncode != 0
