"""lm-eval on our models: likelihoods against plain logits, windows, generation, averages; the step is cached and refuses well."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from model.config import LlamaConfig
from model.generate import generate
from model.harness import flat_metrics, run_harness
from model.inference_jobs import HarnessJob
from model.llama import forward
from model.lm_eval_adapter import LmEvalModel
from model.trained_model import TrainedModel
from tasks.harness import harness_body, harness_step, model_name
from tests.cpu_compiler import xla_flags
from tests.lm_eval_tasks import write_tasks
from tests.trained_run import STEPS, TrainedRun, trained_run

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    return trained_run()


@pytest.fixture(scope="module")
def model(run: TrainedRun) -> TrainedModel:
    return TrainedModel.open(run.directory)


@pytest.fixture(scope="module")
def tasks(run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "mine", run.lines[:20])


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the harness outside of the test's directory, and nothing from the network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def instances(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=arguments[index], idx=index) for index in range(len(arguments))]


@functools.cache
def logits_of(config: LlamaConfig) -> Any:
    return jax.jit(lambda params, tokens: jax.nn.log_softmax(forward(params, tokens, config)[0]))


def plain(model: TrainedModel, ids: list[int], scored: int) -> tuple[float, bool]:
    """By the logits of one row: log-likelihood of the last `scored` ids, and whether all are the likeliest."""
    row = np.zeros((1, model.config.seq_len), np.int32)
    row[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(logits_of(model.config)(model.params, row), np.float64)[len(ids) - 1 - scored : len(ids) - 1]
    targets = np.array(ids[-scored:])
    return float(logits[np.arange(scored), targets].sum()), bool((logits.argmax(-1) == targets).all())


def test_likelihoods_are_those_of_the_logits(model: TrainedModel, run: TrainedRun) -> None:
    adapter = LmEvalModel(model, batch_size=4)
    pairs = [(line[:12], line[12:]) for line in run.lines[:9]] + [("", run.lines[0]), ("Enter " * 60, "Banquo"), ("a ", " b")]
    answers = adapter.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (context, text), (nats, greedy) in zip(pairs, answers, strict=True):
        before = model.prompt_ids(context.rstrip())  # a space at the end belongs to what follows
        ids = before + model.prompt_ids(context + text)[len(before) :]
        expected = plain(model, ids[-model.config.seq_len - 1 :], len(ids) - len(before))
        assert nats == pytest.approx(expected[0], rel=1e-4)
        assert greedy == expected[1]
    (best,) = generate(model.params, model.config, [model.prompt_ids("Enter")], max_new_tokens=3, temperature=0, seed=0)
    requests = [(("", ""), model.prompt_ids("Enter"), best), (("", ""), model.prompt_ids("Enter"), [best[0], (best[1] + 1) % 400])]
    assert [greedy for _, greedy in adapter._loglikelihood_tokens(requests)] == [True, False]
    with pytest.raises(ValueError, match=r"a continuation of 65 tokens cannot be scored: .* 64 tokens"):
        adapter._loglikelihood_tokens([(None, [1], [5] * 65)])


def test_whole_texts_in_windows(model: TrainedModel, run: TrainedRun) -> None:
    texts = [" ".join(run.lines[:12]), run.lines[0], ""]
    for score_bos in (True, False):
        adapter = LmEvalModel(model, batch_size=4, score_bos=score_bos)
        found = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
        for text, nats in zip(texts, found, strict=True):
            ids = [1, *model.vocabulary.encode(text).tolist()]
            ids = [1, *ids] if score_bos else ids
            expected, done = 0.0, 1
            while done < len(ids):  # a window sees one id before those it scores, the last one as many as there is room for
                new = min(len(ids) - done, 64)
                expected += plain(model, ids[max(done + new - 65, 0) : done + new], new)[0]
                done += new
            assert nats == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_generation_ends_at_a_stop_sequence(model: TrainedModel) -> None:
    adapter = LmEvalModel(model, batch_size=2)
    asked: list[tuple] = [("Enter", {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0})]
    (free,) = adapter.generate_until(instances("generate_until", asked))
    stop = free[len(free) // 2]
    asked = [("Enter", {**asked[0][1], "until": [stop]}), ("Is this a dagger " * 20, {"until": ["x"], "max_gen_toks": 4})]
    stopped, other = adapter.generate_until(instances("generate_until", asked))
    assert stopped == free.split(stop)[0]
    assert isinstance(other, str)
    samples = adapter.generate_until(
        instances("generate_until", [("Enter", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0})] * 6)
    )
    assert len(set(samples)) == 6  # of one prompt, in three batches
    for settings, words in (
        ({"top_k": 3, "temperature": 1.0, "do_sample": True}, "asks for top_k=3: only"),
        ({"max_gen_toks": 64}, "=64 of a"),
        ({"num_beams": 4, "max_gen_toks": 4}, "asks for num_beams=4: only"),
        ({"repetition_penalty": 2.0, "max_gen_toks": 4}, "asks for repetition_penalty=2.0: only"),
        ({"do_sample": True}, "without a temperature above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            adapter.generate_until(instances("generate_until", [("a", settings)]))
    neutral = {"until": [], "num_beams": 1, "repetition_penalty": 1.0}
    asked = [("a", {**neutral, "max_gen_toks": 0}), ("a", {**neutral, "max_gen_toks": 2})]
    nothing, something = adapter.generate_until(instances("generate_until", asked))
    assert nothing == ""
    assert something


@pytest.mark.slow
def test_tasks_are_known_by_name(run: TrainedRun, tasks: Path) -> None:
    with pytest.raises(ValueError, match=r"lm-eval has no task 'choos' \(did you mean 'choose'\?\)"):
        run_harness(HarnessJob(model=run.hf, tasks=("choos",), task_dir=tasks))


def test_averages_are_of_tasks_alike_and_by_documents() -> None:
    found = {
        "results": {
            "a": {"alias": "a", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1},
            "b": {"alias": "b", "sample_len": 1, "acc,none": 1.0, "acc_stderr,none": "N/A", "exact_match,strict": 0.25},
            "both": {"alias": "both", "acc,none": 0.9},
        },
        "n-samples": {"a": {"original": 9, "effective": 3}, "b": {"original": 1, "effective": 1}},
    }
    assert flat_metrics(found) == {
        **{"lm_eval/a/acc": 0.5, "lm_eval/a/sample_len": 3, "lm_eval/a/acc_stderr": 0.1, "lm_eval/b/acc": 1.0, "lm_eval/b/sample_len": 1},
        **{"lm_eval/b/exact_match,strict": 0.25, "lm_eval/both/acc": 0.9},
        **{"lm_eval/averages/macro_avg_acc": 0.75, "lm_eval/averages/micro_avg_acc": 0.625},
        **{"lm_eval/averages/macro_avg_exact_match,strict": 0.25, "lm_eval/averages/micro_avg_exact_match,strict": 0.25},
    }


def test_a_step_is_its_model_and_its_tasks_by_content(run: TrainedRun, tasks: Path, tmp_path: Path) -> None:
    def fingerprint(place: Path, **changes: Any) -> str:
        return harness_step(HarnessJob(**{"model": place, "tasks": ("choose",), "task_dir": tasks, **changes})).fingerprint

    last = fingerprint(run.directory)
    assert fingerprint(run.directory / "checkpoints" / str(STEPS), batch_size=3) == last
    others = [
        fingerprint(run.hf),
        fingerprint(run.directory / "checkpoints" / str(STEPS // 2)),
        fingerprint(run.directory, limit=3),
        fingerprint(run.directory, num_fewshot=1),
        fingerprint(run.directory, task_dir=write_tasks(tmp_path / "other", run.lines[:4])),
    ]
    assert len({last, *others}) == 6
    assert model_name(run.hf) == "mine"
    assert model_name(run.directory / "hf-step-6") == "mine-6"
    assert model_name(run.directory / "checkpoints" / "12") == "mine-12"
    with pytest.raises(ValueError, match=r"--task-dir=.* is no directory"):
        fingerprint(run.hf, task_dir=tmp_path / "none")


def test_the_step_keeps_the_results_of_its_process(run: TrainedRun, tasks: Path, tmp_path: Path) -> None:
    step = harness_step(HarnessJob(model=run.hf, tasks=("choose", "whole", "go_on"), task_dir=tasks, limit=3))
    output = harness_body(step, tmp_path, ())
    results = json.loads((tmp_path / "results.json").read_text())
    assert output.files == [tmp_path / "results.json"]
    assert output.stats["metrics"] == results["metrics"]
    assert results["n-samples"] == {name: {"original": 20, "effective": 3} for name in ("choose", "whole", "go_on")}
    metrics = output.stats["metrics"]
    assert 0 <= metrics["lm_eval/choose/acc"] == metrics["lm_eval/averages/macro_avg_acc"] <= 1
    assert 1 < metrics["lm_eval/whole/bits_per_byte"] < 8
    assert metrics["lm_eval/go_on/exact_match"] == 0


@pytest.mark.slow
def test_the_command_runs_once(run: TrainedRun, tasks: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "XLA_"))}
    environment |= {
        "XLA_FLAGS": xla_flags(),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "HF_HOME": str(tmp_path / "hub"),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(CHECKOUT / "flows" / "harness.py"), *arguments, "--root", str(tmp_path / "root")]
        return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)

    asked = [str(run.directory), "--tasks", "choose", "--task-dir", str(tasks), "--limit", "5"]
    done = command(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lm_eval/choose/acc_norm" in done.stdout
    (results,) = (tmp_path / "root" / "eval").glob(f"mine-{STEPS}-*/results.json")
    written = results.stat().st_mtime_ns
    assert json.loads(results.read_text())["n-samples"] == {"choose": {"original": 20, "effective": 5}}
    again = command(*asked)
    assert (again.returncode, results.stat().st_mtime_ns) == (0, written), again.stdout + again.stderr
    assert "lm_eval/choose/acc_norm" in again.stdout
    refused = command(str(tmp_path / "nowhere"), "--tasks", "choose")
    assert refused.returncode == 2
    assert "holds no model" in refused.stderr
