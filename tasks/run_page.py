"""A run on one page, `report.html` in its directory: configuration, plan and actual, curves, evaluations, samples, incidents.

The page has everything in it and asks no other machine for anything. It can be made of a run that is not finished, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment

from model.durable import write_durably
from model.jumps import SKIPPED_DATA
from model.metrics import read_json_lines, read_samples
from model.plots import figures_html
from model.secret_text import without_secrets
from tasks.experiment_record import read_record
from tasks.formatting import duration, number
from tasks.obligations import EVALS, Ledger
from tasks.places import Place, place_of_working
from tasks.summary import four_digits, held_out_rows
from tasks.trainer_child import JOB_FILE, read_outcome

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("run_page.html")


def write_run_page(directory: Path) -> Path:
    """Writes the page of the run in `directory`, of this machine; where it is.

    Raises:
        ValueError: there is no run, or one of its files is damaged.
        OSError: the directory cannot be written.
    """
    job_file = directory / JOB_FILE
    if not job_file.is_file():
        raise ValueError(f"{directory} holds no run: give the directory of one, artifacts/checkpoints/NAME-...")
    page = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page_values(directory))
    write_durably(directory / PAGE, page.encode())
    return directory / PAGE


def page_values(directory: Path) -> dict[str, Any]:
    """What the page shows, by the names of its template."""
    job = json.loads((directory / JOB_FILE).read_text(encoding="utf-8"))
    place = place_of_working(directory.absolute())
    record = read_record(place) or {}
    rows = read_json_lines(directory / "metrics.jsonl")
    outcome = read_outcome(directory)
    final = _last_values(rows) if outcome is None else outcome["final"]
    done = rows[-1]["step"] if rows else 0
    last = job["train"]["num_train_steps"]
    state = "finished" if outcome is not None else f"at step {done:,} of {last:,}"
    evaluations = read_json_lines(directory / EVALS)
    shown = {key: job[key] for key in ("model", "train", "track", "tags")}
    return {
        "name": job["name"],
        "headline": f"{state}, train loss {four_digits(final.get('train/loss'))}, held-out loss {four_digits(final.get('eval/loss'))}",
        "description": record.get("description", ""),
        "comparison": list(_comparison(record.get("plan", {}), rows, last)),
        "components": [
            (name, number(part["tokens"]), f"{part['epochs']:.3g}") for name, part in ((outcome or {}).get("components") or {}).items()
        ],
        "figures": figures_html(rows),
        "held_out": [(name, four_digits(loss), four_digits(bpb)) for name, loss, bpb in held_out_rows(final)],
        "evaluations": [(row["step"], key, f"{value:.6g}") for row in evaluations for key, value in row.items() if key != "step"],
        "samples": read_samples(directory / "samples.jsonl"),
        "incidents": list(incidents(directory, place, record, rows)),
        "code": list(_code(record)),
        "configuration": without_secrets(json.dumps(record.get("config") or shown, indent=1)),
    }


def incidents(directory: Path, place: Place, record: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """`(what, when, details)` of everything that did not go straight on."""
    launches = record.get("launches", [])
    for launch in launches[1:]:
        yield "started again", launch["at"], launch["flow_run"].get("name", "")
    skipped = directory / SKIPPED_DATA
    for one in json.loads(skipped.read_text(encoding="utf-8"))["skipped"] if skipped.is_file() else ():
        what = "rolled back, asked for" if one.get("asked_for") else "rolled back"
        yield what, f"step {one['step']}", f"{one['rows']:,} rows of data left out: {one['why']}"
    checkpoints = directory / "checkpoints"
    for path in sorted(checkpoints.glob("damaged-*")) if checkpoints.is_dir() else ():
        yield "checkpoint damaged", f"step {path.name.split('-')[1]}", f"set aside as {path.name}"
    for row in rows:
        if row.get("optim/skipped_step"):
            yield "step skipped", f"step {row['step']}", f"loss {row.get('train/loss')}, gradient norm {row.get('grad/norm/total')}"
    for one in Ledger(place).due:
        yield "evaluation owed", f"step {one.step}", one.error or "not made yet"


def _comparison(plan: dict[str, Any], rows: list[dict[str, Any]], last_step: int) -> Iterator[tuple[str, str, str]]:
    """`(what, planned, actual)`; what is not known is empty."""
    done, seconds = rows[-1]["step"] if rows else 0, seconds_in_steps(rows)
    tokens = _last(rows, "throughput/total_tokens")
    planned = plan.get("seconds")
    yield "steps", f"{last_step:,}", f"{done:,}"
    yield "tokens", number(plan["tokens"]) if "tokens" in plan else "", "" if tokens is None else number(tokens)
    yield "time in steps", "" if planned is None else duration(planned), duration(seconds)
    yield (
        "tokens a second",
        "" if planned is None else number(plan["tokens"] / planned),
        number(tokens / seconds) if tokens and seconds else "",
    )
    if planned and plan.get("dollars") is not None:
        yield "dollars, at list price", f"{plan['dollars']:,.0f}", f"{plan['dollars'] * seconds / planned:,.0f}"
    for name, key in (("model FLOPs utilisation", "throughput/mfu"), ("goodput of the last start", "goodput")):
        value = _last(rows, key)
        yield name, "", "" if value is None else f"{value:.3g}"


def seconds_in_steps(rows: list[dict[str, Any]]) -> float:
    """Time in training steps: each logged step stands for those since the one logged before it. Repeated steps count once."""
    total, before = 0.0, 0
    for row in rows:
        if isinstance(taken := row.get("throughput/duration"), int | float):
            total += taken * (row["step"] - before)
            before = row["step"]
    return total


def _last_values(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every metric."""
    return {key: value for row in rows for key, value in row.items()}


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    found = _last_values(rows).get(key)
    return float(found) if isinstance(found, int | float) else None


def _code(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the run came from, as its record says."""
    code = record.get("code", {})
    if code:
        yield "commit", f"{code['commit'] or code.get('why')}{', with changes' if code.get('dirty') else ''}"
    for each in record.get("steps", ()):
        yield each["step"], each["fingerprint"][:16]
    yield from record.get("links", {}).items()
