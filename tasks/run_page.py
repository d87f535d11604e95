"""A run on one page, `report.html` in its directory: configuration, plan and actual, curves, evaluations, samples, incidents.

The page has everything in it and asks no other machine for anything. It can be made of a run that is not finished, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment

from model.jumps import SKIPPED_DATA
from model.metrics import read_json_lines, read_samples
from model.plots import figures_html
from model.secret_text import without_secrets
from tasks.artifact_store import artifact_store
from tasks.artifacts import brought_here, open_artifact, read_manifest
from tasks.experiment_record import read_record
from tasks.formatting import duration, number
from tasks.json_files import read_json, read_text, write_text
from tasks.obligations import Ledger
from tasks.places import Place, place_of
from tasks.summary import four_digits, held_out_rows
from tasks.trainer_child import JOB_FILE

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("run_page.html")


def write_run_page(run: str | Place) -> Place:
    """Writes the page of a run, which in a bucket has to be finished, unless it is there as it would be written; where it is.

    Raises:
        ValueError: there is no run, or one of its files is damaged.
        OSError: the directory cannot be written.
    """
    place = place_of(run)
    page = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page_values(place))
    if read_text(place / PAGE) != page:
        write_text(place / PAGE, page)
    return place / PAGE


def page_values(place: Place) -> dict[str, Any]:
    """What the page shows, by the names of its template. Raises ValueError where there is no run or a file of it is damaged."""
    name, config, outcome, directory = _run_at(place)
    record = read_record(place) or {}
    rows = read_json_lines(directory / "metrics.jsonl")
    final = _last_values(rows) if outcome is None else outcome["final"]
    done, last = rows[-1]["step"] if rows else 0, config["train"]["num_train_steps"]
    state = "finished" if outcome is not None else f"at step {done:,} of {last:,}"
    shown = {key: config[key] for key in ("model", "train")}
    return {
        "name": name,
        "headline": f"{state}, train loss {four_digits(final.get('train/loss'))}, held-out loss {four_digits(final.get('eval/loss'))}",
        "description": record.get("description", ""),
        "comparison": list(_comparison(record.get("plan", {}), rows, last)),
        "components": [
            (name, number(part["tokens"]), f"{part['epochs']:.3g}") for name, part in ((outcome or {}).get("components") or {}).items()
        ],
        "figures": figures_html(rows),
        "held_out": [(name, four_digits(loss), four_digits(bpb)) for name, loss, bpb in held_out_rows(final)],
        "evaluations": [(row["step"], key, f"{value:.6g}") for row in Ledger(place).rows() for key, value in row.items() if key != "step"],
        "samples": read_samples(directory / "samples.jsonl"),
        "incidents": list(incidents(place, record, rows)),
        "code": list(_code(record)),
        "configuration": without_secrets(json.dumps(record.get("config") or shown, indent=1)),
    }


def _run_at(place: Place) -> tuple[str, dict[str, Any], dict[str, Any] | None, Path]:
    """Name, configuration, outcome (None where it is not finished) of the run at `place`, and where its curves are on this machine."""
    if (manifest := read_manifest(place)) is not None:
        directory = place if isinstance(place, Path) else Path(brought_here(open_artifact(place, manifest.fingerprint)).path)
        return manifest.name, manifest.config, manifest.stats, directory
    job = read_json(place / JOB_FILE) if isinstance(place, Path) else None
    if job is None or not isinstance(place, Path):
        raise ValueError(f"{place} holds no run: give the directory of one, artifacts/checkpoints/NAME-...; in a bucket, of a finished one")
    return job["name"], job, None, place


def incidents(place: Place, record: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """`(what, when, details)` of everything that did not go straight on."""
    launches = record.get("launches", [])
    for launch in launches[1:]:
        yield "started again", launch["at"], launch["flow_run"].get("name", "")
    for one in (read_json(place / SKIPPED_DATA) or {}).get("skipped", ()):
        what = "rolled back, asked for" if one.get("asked_for") else "rolled back"
        yield what, f"step {one['step']}", f"{one['rows']:,} rows of data left out: {one['why']}"
    for path in artifact_store(place / "checkpoints").children():
        if path.name.startswith("damaged-"):
            yield "checkpoint damaged", f"step {path.name.split('-')[1]}", f"set aside as {path.name}"
    for row in rows:
        if row.get("optim/skipped_step"):
            yield "step skipped", f"step {row['step']}", f"loss {row.get('train/loss')}, gradient norm {row.get('grad/norm/total')}"
    for one in Ledger(place).due:
        yield f"{one.kind} owed", f"step {one.step}", one.error or "not made yet"


def _comparison(plan: dict[str, Any], rows: list[dict[str, Any]], last_step: int) -> Iterator[tuple[str, str, str]]:
    """`(what, planned, actual)`; what is not known is empty."""
    origin = plan.get("origin") or {}
    begin = origin.get("step", 0)
    done, seconds = rows[-1]["step"] if rows else begin, seconds_in_steps(rows, begin)
    tokens = _last(rows, "throughput/total_tokens")
    tokens = None if tokens is None else tokens - origin.get("tokens", 0)
    planned = plan.get("seconds")
    if begin:
        yield "goes on after step", f"{begin:,}", f"{begin:,}"
    yield "steps", f"{last_step - begin:,}", f"{done - begin:,}"
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


def seconds_in_steps(rows: list[dict[str, Any]], begin: int = 0) -> float:
    """Time in training steps after `begin`: each logged step stands for those since the one logged before it. Repeated ones count once."""
    total, before = 0.0, begin
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
