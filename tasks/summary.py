"""The outcome of a run, read from the manifests of its artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.metrics import read_json_lines
from tasks.artifacts import Artifact, brought_here, read_manifest
from tasks.places import Place, place_of


@dataclass(frozen=True)
class RunSummary:
    """Losses, samples and places of a finished training run."""

    name: str
    place: Place
    directory: Path  # of this machine, with the curves
    hf_place: Place | None
    step: int
    final: dict[str, float | str]  # what is no number is "nan" or "inf" in JSON
    samples: list[dict[str, Any]]
    unigram_entropy: float | None
    components: dict[str, dict[str, float]]
    begins_at: int = 0  # the step of the checkpoint that it goes on from

    @classmethod
    def of(cls, artifacts: list[Artifact]) -> RunSummary | None:
        """The summary of the training among `artifacts`; None when they hold none."""
        by_kind = {artifact.kind: artifact for artifact in artifacts}
        if (training := by_kind.get("checkpoints")) is None or (manifest := read_manifest(training.path)) is None:
            return None
        mixture = read_manifest(by_kind["mixtures"].path) if "mixtures" in by_kind else None
        return cls(
            name=training.name,
            place=place_of(training.path),
            directory=Path(brought_here(training).path),
            hf_place=place_of(by_kind["hf"].path) if "hf" in by_kind else None,
            step=manifest.stats["step"],
            final=manifest.stats["final"],
            samples=manifest.stats["samples"],
            unigram_entropy=None if mixture is None else mixture.stats.get("unigram_entropy"),
            components=manifest.stats.get("components") or {},
            begins_at=begins_at(manifest.stats),
        )

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_json_lines(self.directory / "metrics.jsonl")

    def held_out(self) -> list[tuple[str, float | str | None, float | str | None]]:
        """`(component or tag, nats per token, bits per byte)` of the last evaluation, all components together first."""
        return held_out_rows(self.final)

    def headline(self) -> str:
        """One line: the losses, with the unigram entropy beside them."""
        began = f" (its own begin after step {self.begins_at})" if self.begins_at else ""
        parts = [f"step {self.step}{began}", f"train loss {four_digits(self.final['train/loss'])}"]
        if "eval/loss" in self.final:
            parts.append(f"held-out loss {four_digits(self.final['eval/loss'])}")
        if "eval/bpb" in self.final:
            parts.append(f"{four_digits(self.final['eval/bpb'])} bits per byte")
        if self.unigram_entropy is not None:
            parts.append(f"unigram entropy of the text {self.unigram_entropy:.4f}")
        return ", ".join(parts)

    def places(self) -> list[tuple[str, Place]]:
        """What lies where."""
        places: list[tuple[str, Place]] = [
            ("checkpoint", self.place / "checkpoints" / str(self.step)),
            ("metrics", self.place / "metrics.jsonl"),
            ("loss curve", self.place / "loss.png"),
            ("loss curve, interactive", self.place / "loss.html"),
            ("samples", self.place / "samples.jsonl"),
            ("report", self.place / "report.html"),
        ]
        return places + ([("Hugging Face directory", self.hf_place)] if self.hf_place else [])

    def markdown(self) -> str:
        """The summary for the Prefect UI."""
        held_out = "\n".join(f"| {name} | {four_digits(loss)} | {four_digits(bpb)} |" for name, loss, bpb in self.held_out())
        read = "\n".join(f"| {name} | {part['tokens']:,.0f} | {part['epochs']:.3g} |" for name, part in self.components.items())
        places = "\n".join(f"- {what}: `{path}`" for what, path in self.places())
        samples = "\n\n".join(f"> {sample['text']}".replace("\n", "\n> ") for sample in self.samples)
        return (
            f"# {self.name}\n\n{self.headline()}\n\n| held-out | nats per token | bits per byte |\n|---|---|---|\n{held_out}\n\n"
            f"| trained on | tokens | epochs |\n|---|---|---|\n{read}\n\n"
            f"## Samples\n\n{samples}\n\n## Where everything lies\n\n{places}\n"
        )


def begins_at(stats: Mapping[str, Any]) -> int:
    """The step that a run went on from, by its manifest's stats; 0 where it began anew."""
    return int((stats.get("origin") or {}).get("step", 0))


def held_out_rows(final: dict[str, Any]) -> list[tuple[str, float | str | None, float | str | None]]:
    """`(component or tag, nats per token, bits per byte)` of the last values of the curves, all components together first."""
    names = [key.split("/")[1] for key in final if key.startswith("eval/") and key.count("/") == 2 and key.endswith("/loss")]
    together = [("all", final.get("eval/loss"), final.get("eval/bpb"))] if "eval/loss" in final else []
    return together + [(name, final.get(f"eval/{name}/loss"), final.get(f"eval/{name}/bpb")) for name in names]


def four_digits(value: float | str | None) -> str:
    """Four digits; what is no number stands in JSON as "nan"."""
    return "" if value is None else f"{float(value):.4f}"
