"""The curves of a run, `metrics.jsonl` and `samples.jsonl`, as text that is kept elsewhere too: only weights can be trained again."""

from __future__ import annotations

import json
from pathlib import Path

from model.durable import write_durably
from model.metrics import read_json_lines

CURVES = ("metrics.jsonl", "samples.jsonl")


def curves_until(directory: Path, step: int) -> dict[str, str]:
    """The rows of the curves in `directory` up to `step`, by file name."""
    rows = {name: (row for row in read_json_lines(directory / name) if row["step"] <= step) for name in CURVES}
    return {name: "".join(json.dumps(row) + "\n" for row in found) for name, found in rows.items()}


def put_curves_back(directory: Path, curves: dict[str, str]) -> list[str]:
    """Writes those of `curves` whose file does not begin with them; their names. The trainer cuts off the rows after its resume step."""
    others = [name for name, lines in curves.items() if not _begins_with(directory / name, lines.encode())]
    for name in others:
        write_durably(directory / name, curves[name].encode())
    return others


def _begins_with(path: Path, lines: bytes) -> bool:
    return path.is_file() and path.read_bytes().startswith(lines)
