"""The summary of a run whose last numbers are none: a skipped last step leaves "nan" in its curve."""

from __future__ import annotations

from pathlib import Path

from tasks.summary import RunSummary, four_digits


def test_numbers_that_are_none_are_shown_as_such() -> None:
    assert [four_digits(value) for value in (None, 1.23456, "nan", "inf", 0.0)] == ["", "1.2346", "nan", "inf", "0.0000"]


def test_a_run_that_skipped_its_last_step_has_a_summary(tmp_path: Path) -> None:
    final = {"train/loss": "nan", "eval/loss": 2.5, "eval/bpb": "nan", "eval/web/loss": "nan"}
    summary = RunSummary(
        name="run", step=8, place=tmp_path, directory=tmp_path, hf_place=None, final=final, samples=[], unigram_entropy=6.0, components={}
    )
    assert summary.headline() == "step 8, train loss nan, held-out loss 2.5000, nan bits per byte, unigram entropy of the text 6.0000"
    assert "| web | nan |  |" in summary.markdown()
