"""The benchmarks run and say what they promise; how fast anything is, is no test."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import corpus, maxtext_compile
from benchmarks.adversarial import adversarial_strings
from benchmarks.attention import TEMPORARIES_MIB, compiled_gradient, temporaries_mib
from benchmarks.measure import bar, compare, process_tree
from model.flops import executed_flops_per_token
from model.presets import JOBS
from model.slices import slice_named

CHECKOUT = Path(__file__).resolve().parent.parent
NAMES = ("tokenization", "encoders", "input_path", "train_step", "observation")
SPREAD = {"min", "median", "max"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "benchmarks" / "run.py"), *arguments], capture_output=True, text=True, check=False
    )


def test_compare_takes_medians_and_their_ratio() -> None:
    rows = {"ours": [{"s": 3.0}, {"s": 1.0}, {"s": 2.0}], "peer": [{"s": 8.0}, {"s": 4.0}, {"s": 3.0}]}
    assert compare(rows, {"s": "seconds"}) == {
        "s": {
            "unit": "seconds",
            "ours": {"min": 1.0, "median": 2.0, "max": 3.0},
            "peer": {"min": 3.0, "median": 4.0, "max": 8.0},
            "ratio": 0.5,
        }
    }


@pytest.mark.parametrize(
    ("bound", "met"), [({"at_least": 10}, True), ({"at_least": 11}, False), ({"at_most": 10}, True), ({"at_most": 9}, False)]
)
def test_a_bar_says_what_it_holds_a_number_against(bound: dict[str, float], met: bool) -> None:
    assert bar("times", 10.0, **bound) == {"what": "times", "value": 10.0, **bound, "met": met}


def test_process_tree_counts_what_children_of_children_use() -> None:
    burn = "sum(range(10_000_000))"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    alone, tree = (process_tree([sys.executable, "-c", program]) for program in ("pass", nested))
    assert tree["cpu_s"] > alone["cpu_s"] > 0
    assert tree["peak_rss_mib"] > 1
    with pytest.raises(RuntimeError, match="ended with 3"):
        process_tree([sys.executable, "-c", "raise SystemExit(3)"])


def test_adversarial_strings_are_text_and_always_the_same() -> None:
    strings = adversarial_strings(2000)
    assert len(strings) == 2000
    assert strings[:100] == adversarial_strings(100)
    assert "" in strings
    joined = "".join(strings)
    joined.encode()  # raises for what is no text
    for wanted in ("<|end_of_text|>", "</s>", "\x00", "\r\n", "\U0001f468\u200d", " " * 70):
        assert wanted in joined
    assert len(set(joined)) > 1000


def test_packaged_corpus_has_every_word_of_the_packaged_text(tmp_path: Path) -> None:
    made = corpus.packaged_corpus(tmp_path)
    (files,) = made.files.values()
    texts = [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == made.documents > 500
    assert sum(len(text.encode()) for text in texts) == made.text_bytes
    packaged = sorted((CHECKOUT / "tasks" / "corpus" / "shakespeare").rglob("*.txt"))
    words = sorted(word for path in packaged for word in path.read_text(encoding="utf-8").split())
    assert sorted(word for text in texts for word in text.split()) == words
    assert corpus.packaged_corpus(tmp_path) == made


def test_what_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(corpus, "_COMPONENTS", {name: corpus._COMPONENTS[name] for name in ("gcide", "kernel")})  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(corpus.Missing, match=r"gcide: dict-gcide needs apt-get.*kernel: linux-doc-6\.1 needs apt-get"):
        corpus.corpus()
    with pytest.raises(corpus.Missing, match="needs npm"):
        corpus.llama3_tokenizer()
    assert not list((tmp_path / "prefect-llama").rglob("index.json"))

    monkeypatch.setattr(corpus, "_COMPONENTS", {"gcide": corpus._COMPONENTS["gcide"], "own": (lambda: iter(["a text"]), 1)})  # pyright: ignore[reportPrivateUsage]
    made = corpus.corpus()
    assert (made.documents, made.text_bytes, list(made.missing)) == (1, 6, ["gcide"])
    assert "apt-get" in made.notes()["without gcide"]


def test_wrong_requests_are_refused() -> None:
    unknown = run("inputpath")
    assert unknown.returncode == 2
    assert f"no benchmark inputpath; there are {', '.join(NAMES)}" in unknown.stderr
    assert "--rounds=0" in run("--rounds", "0").stderr


def test_gradient_of_attention_stays_small_at_8192_tokens() -> None:
    assert temporaries_mib(compiled_gradient("flash")) <= TEMPORARIES_MIB


def test_attention_forms_have_the_same_gradient() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (1, 8, 512, 64)) for key in keys]
    gradients = {name: compiled_gradient(name, 512)(*arrays) for name in ("plain", "flash", "jax.nn")}
    for found in (gradients["flash"], gradients["jax.nn"]):
        for one, expected in zip(found, gradients["plain"], strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_executed_flops_are_products_and_kernels() -> None:
    job, tpu_slice = JOBS["dclm-1b"], slice_named("v4-128")
    tokens, seq_len = 256 * 2048 / 64, job.model.seq_len
    executed = {
        remat: tokens * executed_flops_per_token(job.model, seq_len, remat=remat, attention="splash") for remat in ("full", "save_attn")
    }
    memory, sent = {"arguments": 2.0, "temporaries": 3.0}, {"all-gather": 5.0, "all-reduce": 7.0}

    def figures(products: float, kernels_per_layer: int) -> dict[str, float]:
        kernels = kernels_per_layer * job.model.num_layers
        return maxtext_compile.figures_of(job, tpu_slice, memory, sent, products, kernels, logits=0, compile_cpu_s=1.0)

    # What the formula counts at a sequence of length 0 is all but attention.
    without_attention = tokens * executed_flops_per_token(job.model, 0, remat="full", attention="plain")
    found = figures(without_attention, 4)
    assert found["executed, TF"] == pytest.approx(executed["full"])
    assert found["executed, TF"] - figures(without_attention, 3)["executed, TF"] == pytest.approx(executed["full"] - executed["save_attn"])
    assert (found["HBM, GiB"], found["ICI, GB"]) == (5.0, 12.0)
    lines = maxtext_compile.table({"ours": {"HBM, GiB": 2.0**30}, "MaxText": {"HBM, GiB": 2.0**31, "kernels": 3}}).splitlines()
    assert [line.split()[-2:] for line in lines] == [["ours", "MaxText"], ["1", "2"], ["0", "3"]]


def test_maxtext_is_asked_for_the_same_job() -> None:
    options = dict(option.split("=", 1) for option in maxtext_compile.maxtext_options(JOBS["dclm-1b"], slice_named("v4-128"), "out"))
    assert int(options["per_device_batch_size"]) * int(options["ici_fsdp_parallelism"]) == JOBS["dclm-1b"].batch_size
    assert (options["head_dim"], options["base_num_decoder_layers"], options["vocab_size"]) == ("128", "24", "128256")


def test_peers_must_compute_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    train_step, environments = importlib.import_module("train_step"), importlib.import_module("environments")
    row = {"first_loss": 10.0, "last_loss": 9.0, "cpu_s": 2.0, "peak_rss_mib": 1700.0}
    rows = {"ours": [row], "torch": [row | {"cpu_s": 4.0}], "maxtext": [row | {"first_loss": 11.0}]}
    train_step.check_losses("larger", rows)
    assert [(held["value"], held["met"]) for held in train_step.bars_of(rows)] == [(0.5, True), (1.0, False), (1700.0, False)]
    with pytest.raises(RuntimeError, match=r"last_loss is 9\.01 for torch"):
        train_step.check_losses("larger", rows | {"torch": [row | {"last_loss": 9.01}]})
    with pytest.raises(RuntimeError, match="does not fall"):
        train_step.check_losses("larger", rows | {"maxtext": [row | {"first_loss": 9.0}]})

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(environments, "_PYTHON", "3.99")
    assert not environments.is_made(environments.MAXTEXT[0])
    with pytest.raises(environments.Missing, match=r"python3\.99"):
        environments.environment(*environments.MAXTEXT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_worse_than_maxtext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    environments = importlib.import_module("environments")
    if not environments.is_made(environments.MAXTEXT[0]) or not importlib.util.find_spec("libtpu"):
        pytest.skip("MaxText's environment is not made (`python benchmarks/maxtext_compile.py` makes it), or there is no libtpu")
    script = [sys.executable, str(CHECKOUT / "benchmarks" / "maxtext_compile.py"), "--layers", "2", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    columns = json.loads((tmp_path / "report.json").read_text())["columns"]
    assert columns["ours"]["HBM arguments, GiB"] == pytest.approx(columns["MaxText"]["HBM arguments, GiB"], rel=1e-3)
    assert columns["ours"]["arrays [*, sequence, vocabulary]"] == 0 < columns["MaxText"]["arrays [*, sequence, vocabulary]"]


@pytest.mark.slow
def test_quick_run_has_all_fields(tmp_path: Path) -> None:
    done = run("--quick", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"date", "command", "machine", "load_average", "versions", "benchmarks"} == report.keys()
    assert report["machine"]["cores"] >= 1
    assert {"before", "after"} == report["load_average"].keys()
    assert set(NAMES) == report["benchmarks"].keys()
    assert report["versions"]["seqio"] in done.stdout

    results = report["benchmarks"]
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        assert "make oracle" in results.pop("train_step")["skipped"]
    if "skipped" in results["tokenization"]:
        assert "Beam's environment is not made" in results.pop("tokenization")["skipped"]
    assert not any(result.get("bars") for result in results.values())  # small cases are held against nothing
    for name, result in results.items():
        for case in result["cases"]:
            shared = {"peak_rss_mib"} if name == "observation" else set()  # both sides are one process
            assert {"cpu_s", "wall_s", "peak_rss_mib"} - shared <= case["metrics"].keys(), name
            for metric in case["metrics"].values():
                assert metric["unit"] in done.stdout
                for side in ("ours", "peer"):
                    assert metric[side].keys() == SPREAD
                    assert 0 < metric[side]["min"] <= metric[side]["median"] <= metric[side]["max"]
                assert metric["ratio"] == pytest.approx(metric["ours"]["median"] / metric["peer"]["median"])
    for losses in (case["losses"] for case in results.get("train_step", {"cases": []})["cases"]):
        assert losses["first_loss"]["ours"] == pytest.approx(losses["first_loss"]["peer"], rel=1e-4)
