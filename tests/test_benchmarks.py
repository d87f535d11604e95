"""The benchmarks run and say what they promise; how fast anything is, is no test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import corpus
from benchmarks.adversarial import adversarial_strings
from benchmarks.measure import bar, compare, process_tree

CHECKOUT = Path(__file__).resolve().parent.parent
NAMES = ("tokenization", "encoders", "input_path", "train_step")
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
            assert {"cpu_s", "wall_s", "peak_rss_mib"} < case["metrics"].keys(), name
            for metric in case["metrics"].values():
                assert metric["unit"] in done.stdout
                for side in ("ours", "peer"):
                    assert metric[side].keys() == SPREAD
                    assert 0 < metric[side]["min"] <= metric[side]["median"] <= metric[side]["max"]
                assert metric["ratio"] == pytest.approx(metric["ours"]["median"] / metric["peer"]["median"])
    for losses in (case["losses"] for case in results.get("train_step", {"cases": []})["cases"]):
        assert losses["first_loss"]["ours"] == pytest.approx(losses["first_loss"]["peer"], rel=1e-4)
