"""Training runs side by side: found below roots, by globs or in buckets; what each is, cost and reached. Neither Prefect nor JAX."""

from __future__ import annotations

import fnmatch
import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.comparison_plots import AXES, Curve
from model.flops import num_parameters
from model.job import TrainingJob
from model.metrics import read_json_lines
from model.mixture_store import MixtureTokenizer
from model.origin import origin_of
from tasks import objects
from tasks.artifact_store import artifact_store
from tasks.artifacts import Artifact, brought_here, read_manifest
from tasks.formatting import flops, number
from tasks.manifests import Manifest
from tasks.places import SCHEME, ObjectPath, Place, place_of
from tasks.summary import begins_at, four_digits
from tasks.sweep_fields import written

METRICS, JOB, SWEEP, RUNS = "metrics.jsonl", ".job.json", "sweep.json", "checkpoints"
LOSSES = ("train/loss", "eval/loss", "eval/bpb")


@dataclass(frozen=True)
class ComparedRun:
    """One run: `rows` of its metrics, and the identity fields of its configuration by dotted name."""

    name: str
    place: str
    finished: bool
    num_parameters: int | None
    fields: dict[str, Any]
    rows: list[dict[str, Any]]
    begins_at: int = 0
    """The step of the checkpoint that it goes on from: its hours are those since, tokens and FLOPs those of its weights in all."""
    anew: bool = True
    """Whether it began with fresh weights."""

    @property
    def tokens(self) -> float | None:
        """Trained on so far, before it went on from a checkpoint too."""
        return self._last("throughput/total_tokens")

    @property
    def flops(self) -> float | None:
        """Model FLOPs so far, causal attention at half."""
        gigaflops = self._last("throughput/total_gflops")
        return None if gigaflops is None else gigaflops * 1e9

    @property
    def hours(self) -> float:
        """In steps and hooks so far, by the speed at the steps that were logged; without starting and stopping."""
        return self.hours_by_row()[-1]

    def loss(self, key: str) -> float | None:
        """The last value of a metric; None where there is none, nan where it was no number."""
        return self._last(key)

    def hours_by_row(self) -> list[float]:
        """Hours until each row."""
        hours, before, total = [], self.begins_at, 0.0
        for row in self.rows:
            steps, before = row["step"] - before, row["step"]
            total += steps * float(row.get("throughput/duration", 0.0)) + float(row.get("throughput/hook_time", 0.0))
            hours.append(total / 3600)
        return hours

    def curve(self) -> Curve:
        """Its losses over each axis of the plot."""
        along = {
            "steps": [float(row["step"]) for row in self.rows],
            "tokens": [float(row.get("throughput/total_tokens", 0.0)) for row in self.rows],
            "FLOPs": [1e9 * float(row.get("throughput/total_gflops", 0.0)) for row in self.rows],
            "hours": self.hours_by_row(),
        }
        assert along.keys() == set(AXES)
        return Curve(self.name, along, *([_number(row.get(key)) for row in self.rows] for key in LOSSES[:2]))

    def _last(self, key: str) -> float | None:
        return next((float(row[key]) for row in reversed(self.rows) if key in row), None)


def find_runs(words: Sequence[str]) -> list[ComparedRun]:
    """The runs that the words name, each once: a run's directory, a root, a sweep's table, a glob of these, or gs://bucket/prefix.

    Raises:
        ValueError: a word names no run that has logged a loss.
    """
    if not words:
        raise ValueError("name at least one run: its directory artifacts/checkpoints/NAME-..., a root such as artifacts, or a glob")
    found: dict[str, ComparedRun] = {}
    for word in words:
        runs = [run for place in _places(word) if (run := _read(place)) is not None]
        if not runs:
            raise ValueError(
                f"{word}: no run with a loss here: give a run's directory (artifacts/checkpoints/NAME-...), a root, a sweep's directory, "
                "or a glob of them; of a bucket finished runs are read"
            )
        found.update({run.place: run for run in runs})
    return _named_apart(list(found.values()))


def differing_fields(runs: Sequence[ComparedRun]) -> list[str]:
    """Dotted names of the fields in which the runs are not all alike."""
    names = dict.fromkeys(name for run in runs for name in run.fields)
    return [name for name in names if len({written(run.fields.get(name)) for run in runs}) > 1]


def table(runs: Sequence[ComparedRun]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names, and a line of text for each run, the lowest held-out loss first."""
    fields = differing_fields(runs)
    columns = ("run", "parameters", "tokens", "FLOPs", "hours", "train loss", "held-out loss", "bits per byte", *fields)
    ordered = sorted(runs, key=lambda run: (_sortable(run.loss("eval/loss")), _sortable(run.loss("train/loss"))))
    return columns, [
        (
            _name_and_state(run),
            *(
                "" if value is None else show(value)
                for value, show in ((run.num_parameters, number), (run.tokens, number), (run.flops, flops))
            ),
            f"{run.hours:.3g}",
            *(four_digits(run.loss(key)) for key in LOSSES),
            *(written(run.fields[name]) if name in run.fields else "" for name in fields),
        )
        for run in ordered
    ]


def _name_and_state(run: ComparedRun) -> str:
    state = [f"after step {run.begins_at}"] if run.begins_at else []
    state += [] if run.finished else [f"step {run.rows[-1]['step']}, not finished"]
    return f"{run.name} ({', '.join(state)})" if state else run.name


def _places(word: str) -> list[Place]:
    if word.startswith(SCHEME):
        return _bucket_places(word)
    paths = sorted(glob.glob(word)) if glob.has_magic(word) else [word]
    return [run for path in paths for run in _local_places(Path(path))]


def _local_places(path: Path) -> list[Place]:
    if path.name == SWEEP:
        path = path.parent
    if (path / SWEEP).is_file():
        return [place_of(row["place"]) for row in json.loads((path / SWEEP).read_text(encoding="utf-8"))["rows"]]
    if (path / METRICS).is_file():
        return [path.absolute()]
    below = path / RUNS if (path / RUNS).is_dir() else path
    return sorted(each.parent.absolute() for each in below.glob(f"*/{METRICS}"))


def _bucket_places(word: str) -> list[Place]:
    if glob.has_magic(word):
        start, _, pattern = word.rpartition("/")
        if glob.has_magic(start):
            raise ValueError(f"{word}: in a bucket only the last part can be a pattern")
        return [each for each in artifact_store(place_of(start)).children() if fnmatch.fnmatchcase(each.name, pattern)]
    place = ObjectPath.parse(word)
    if place.parent.name == "sweeps":
        value = json.loads(objects.read(place / SWEEP)[0])
        return [place_of(row["place"]) for row in value["rows"]]
    if artifact_store(place).has_manifest():
        return [place]
    return artifact_store(place if place.name == RUNS else place / RUNS).children()


def _read(place: Place) -> ComparedRun | None:
    """The run there; None where there is none that has logged a loss."""
    manifest = read_manifest(place)
    if manifest is not None and manifest.kind != RUNS:
        return None
    if isinstance(place, ObjectPath):
        if manifest is None:
            return None
        here = Path(brought_here(Artifact(kind=RUNS, name=manifest.name, path=str(place), fingerprint=manifest.fingerprint)).path)
    else:
        here = place
    rows = read_json_lines(here / METRICS)
    if not any("train/loss" in row for row in rows):
        return None
    if manifest is not None:
        parameters = manifest.stats.get("num_parameters")
        anew = manifest.config.get("initial_weights") is None
        return ComparedRun(manifest.name, str(place), True, parameters, _fields_of(manifest), rows, begins_at(manifest.stats), anew)
    return _unfinished(here, rows)


def _fields_of(manifest: Manifest) -> dict[str, Any]:
    return _flat({key: manifest.config[key] for key in ("model", "train")}) | {"data": manifest.upstream[0][:16]}


def _unfinished(directory: Path, rows: list[dict[str, Any]]) -> ComparedRun:
    try:
        job = TrainingJob.model_validate_json((directory / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # written by another version: its curve can be drawn all the same
        return ComparedRun(directory.name, str(directory), False, None, {}, rows)
    try:
        parameters = num_parameters(job.model.with_vocab(MixtureTokenizer.read(job.mixture).vocab_size))
    except (OSError, ValueError):
        parameters = None  # its data is elsewhere
    fields = _flat(job.identity_fields()) | {"data": job.mixture.name.rpartition("-")[2]}
    anew = job.train.initialize_from_checkpoint_path is None and job.train.initialize_from_hf is None
    return ComparedRun(job.name, str(directory), False, parameters, fields, rows, origin_of(job.train).step, anew)


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{before}{name}.") if isinstance(inner, Mapping) else {f"{before}{name}": inner}
    return flat


def _named_apart(runs: list[ComparedRun]) -> list[ComparedRun]:
    """Runs of one name get their directories' instead."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else ComparedRun(**{**vars(run), "name": place_of(run.place).name}) for run in runs]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _sortable(value: float | None) -> float:
    return float("inf") if value is None or value != value else value


def all_of(runs: Iterable[ComparedRun]) -> list[dict[str, Any]]:
    """The runs' numbers as JSON values."""
    return [
        {
            "name": run.name,
            "place": run.place,
            "finished": run.finished,
            "begins_at": run.begins_at,
            "num_parameters": run.num_parameters,
            "step": run.rows[-1]["step"],
            "tokens": run.tokens,
            "flops": run.flops,
            "hours": run.hours,
            **{key: run.loss(key) for key in LOSSES},
        }
        for run in runs
    ]
