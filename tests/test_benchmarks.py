"""The benchmarks run and say what they promise; how fast anything is, is no test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import compare

CHECKOUT = Path(__file__).resolve().parent.parent
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


def test_wrong_requests_are_refused() -> None:
    unknown = run("inputpath")
    assert unknown.returncode == 2
    assert "no benchmark inputpath; there are input_path, train_step" in unknown.stderr
    assert "--rounds=0" in run("--rounds", "0").stderr


@pytest.mark.slow
def test_quick_run_has_all_fields(tmp_path: Path) -> None:
    done = run("--quick", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"date", "command", "machine", "load_average", "versions", "benchmarks"} == report.keys()
    assert report["machine"]["cores"] >= 1
    assert {"before", "after"} == report["load_average"].keys()
    assert {"input_path", "train_step"} == report["benchmarks"].keys()
    assert report["versions"]["seqio"] in done.stdout

    results = report["benchmarks"]
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        assert "make oracle" in results.pop("train_step")["skipped"]
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
