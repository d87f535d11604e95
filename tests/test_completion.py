"""Text from checkpoints of every form: the same from each, streamed as at once, and refusals that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.child import PARENT_VARIABLE
from model.completion import Continuation, complete
from model.generate import generate
from model.inference_jobs import CompletionJob
from model.trained_model import TrainedModel
from model.vocabularies.vocabulary import Vocabulary
from tests.cpu_compiler import xla_flags
from tests.trained_run import STEPS, TrainedRun, trained_run

CHECKOUT = Path(__file__).resolve().parent.parent
PROMPTS = ("Is this a dagger", "Enter")
SAMPLED = {"temperature": 0.9, "seed": 1, "max_new_tokens": 24}  # this model's likeliest token is most often the same


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    return trained_run()


def texts(model: Path, prompts: Sequence[str] = PROMPTS, **settings: float) -> list[str]:
    """What is streamed of each continuation, put together."""
    said = [""] * len(prompts)
    for event in complete(CompletionJob(model=model, prompts=tuple(prompts), **settings)):  # pyright: ignore[reportArgumentType]
        if event["event"] == "text":
            said[event["prompt"]] += event["text"]
    return said


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != PARENT_VARIABLE} | {"XLA_FLAGS": xla_flags()}
    words = [sys.executable, str(CHECKOUT / "flows" / "generate.py"), *arguments]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True, cwd="/"
    )


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_what_is_streamed_is_what_generate_gives(run: TrainedRun, temperature: float) -> None:
    model = TrainedModel.open(run.directory)
    ids = [model.prompt_ids(prompt) for prompt in PROMPTS]
    fixed = {"eos_id": model.vocabulary.eos_id, "num_ids": model.vocabulary.vocab_size, "top_p": 0.95, "seed": 3}
    rows = generate(model.params, model.config, ids, max_new_tokens=30, temperature=temperature, **fixed)  # pyright: ignore[reportArgumentType]
    whole = [model.vocabulary.decode(prompt + row) for prompt, row in zip(ids, rows, strict=True)]
    said = texts(run.directory, temperature=temperature, max_new_tokens=30, seed=3)
    assert [prompt + text for prompt, text in zip(PROMPTS, said, strict=True)] == whole
    assert all(said)


@pytest.mark.slow
def test_every_form_of_a_checkpoint_gives_the_same_text(run: TrainedRun, tmp_path: Path) -> None:
    expected = texts(run.directory, **SAMPLED)
    assert texts(run.hf, temperature=0) == texts(run.directory, temperature=0)
    assert texts(run.directory / "checkpoints" / str(STEPS), **SAMPLED) == expected
    assert texts(run.hf, **SAMPLED) == expected
    assert texts(run.directory / "checkpoints" / str(STEPS // 2), **SAMPLED) != expected
    moved, alone = tmp_path / "elsewhere", tmp_path / "alone"
    shutil.copytree(run.root, moved)
    in_moved = moved / "checkpoints" / run.directory.name
    (in_moved / ".job.json").write_text(json.dumps({"mixture": "/nowhere"}))
    # the root was moved as a whole: no path that the run was trained with holds any more, and the token stores are not needed
    shutil.rmtree(moved / "tokens")
    shutil.rmtree(in_moved / "hf")
    assert texts(in_moved, **SAMPLED) == expected
    # the run directory alone: its export has the tokenizer
    shutil.copytree(run.directory, alone)
    (alone / ".job.json").unlink()
    assert texts(alone, **SAMPLED) == expected
    shutil.rmtree(alone / "hf")
    with pytest.raises(ValueError, match=r"tokenizer of .*alone is not to be found .*put the mixture"):
        texts(alone)


def test_no_character_is_said_in_halves() -> None:
    text = "caf\u00e9 \U0001f642 \u65e5\u672c"
    vocabulary = Vocabulary.open_bytes()
    ids = vocabulary.encode(text).tolist()
    row = Continuation(vocabulary, vocabulary.encode("a ").tolist(), len(ids) + 1)
    said = []
    for one in ids:
        row.ids.append(one)
        said.append(row.more())
    assert "".join(said) == text
    assert [part for part in said if part] == list(text)
    row.ids.append(ids[-1])  # the last id there will be, and half a character
    assert row.ended
    assert row.more() == "\ufffd"


def test_what_cannot_work_is_refused(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt 2 is empty: give some text"):
        texts(run.hf, ["a", ""])
    with pytest.raises(ValueError, match=r"prompt 1 has .* tokens, which leaves room for 0 more .*context of 64: shorten it"):
        texts(run.hf, ["Macbeth " * 40])
    with pytest.raises(ValueError, match="and max_new_tokens=60: lower it, or shorten the prompt"):
        texts(run.hf, ["Macbeth and Banquo"], max_new_tokens=60)
    with pytest.raises(ValueError, match=r"nowhere holds no model: give a run's directory .*; it does not exist"):
        texts(tmp_path / "nowhere")
    shutil.copytree(run.hf, tmp_path / "hf")
    for file in (tmp_path / "hf").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer that is known"):
        texts(tmp_path / "hf")
    shutil.copytree(run.directory / "checkpoints" / str(STEPS), tmp_path / "run" / "checkpoints" / "7")
    largest = max((path for path in (tmp_path / "run").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    shutil.copytree(run.hf, tmp_path / "run" / "hf")
    with pytest.raises(ValueError, match=r"cannot be used: .* has another content than was written"):
        texts(tmp_path / "run")


def test_the_command(run: TrainedRun) -> None:
    expected = [prompt + text for prompt, text in zip(PROMPTS, texts(run.hf, temperature=0, max_new_tokens=12), strict=True)]
    out, err = (process := command(str(run.hf), *PROMPTS, "--greedy", "--max-new-tokens", "12")).communicate(timeout=240)
    assert (process.returncode, out) == (0, f"{expected[0]}\n\n{expected[1]}\n"), err
    out, err = (process := command(str(run.root / "no"), "x")).communicate(timeout=240)
    assert (process.returncode, out) == (2, "")
    assert "holds no model: give a run's directory" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_traceback(run: TrainedRun) -> None:
    process = command(str(run.hf), *(["Enter"] * 3), "--temperature", "1.5")
    assert process.stdout is not None
    assert process.stdout.read(1) == "E"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode in (0, 130), "it may have been done by then"
    assert "Traceback" not in err


def test_help_is_light() -> None:
    words = "import sys; import flows.generate; assert not {'jax', 'tensorflow', 'prefect', 'lm_eval'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", words], check=True, cwd=CHECKOUT, timeout=60)
