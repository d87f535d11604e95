"""metrics.jsonl across kills: no torn line survives, no step is there twice, none is lost."""

from __future__ import annotations

import json
from pathlib import Path

from model.metrics import JsonLines, MetricsLog, read_json_lines, read_samples


def test_one_row_a_step_from_several_sources(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, [])
    log.log(1, {"train/loss": 2.0})
    log.log(1, {"eval/loss": 3.0})
    log.log(2, {"train/loss": float("nan")})
    log.close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 2.0, "eval/loss": 3.0},
        {"step": 2, "train/loss": "nan"},
    ]


def test_resume_drops_what_will_be_computed_again_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "tr')
    lines = JsonLines(path, resume_step=3)
    lines.write({"step": 4, "new": True})
    lines.close()
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "new": True}]


def test_newest_samples(tmp_path: Path) -> None:
    assert read_samples(tmp_path / "none.jsonl") == []
    lines = JsonLines(tmp_path / "samples.jsonl", 0)
    for step, text in ((1, "a"), (2, "b"), (2, "c")):
        lines.write({"step": step, "text": text})
    lines.close()
    assert [sample["text"] for sample in read_samples(tmp_path / "samples.jsonl")] == ["b", "c"]
