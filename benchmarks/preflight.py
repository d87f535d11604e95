"""The reference jobs compiled for TPU slices here: memory, FLOPs, traffic and bounds beside their bars, and what compiling costs.

    python benchmarks/preflight.py [--json FILE]

Bytes, GiB and FLOPs are exact and the same on any machine; CPU-seconds and peak RSS are this machine's. What was compiled before is
read from disk with the figures of then; `PREFECT_LLAMA_CACHE=DIRECTORY` chooses where that is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
COLUMNS = (
    ("GiB", "hbm_gib_per_chip", "{:.2f}"),
    ("usable", "hbm_usable_gib", "{:.2f}"),
    ("remat", "remat", "{}"),
    ("microbatches", "microbatches", "{}"),
    ("options", "flags", "{}"),
    ("executed/model", "recomputation", "{:.3f}"),
    ("HBM GB", "hbm_bytes_per_chip", "{:.0f}"),
    ("ICI GB", "ici_bytes_per_chip", "{:.2f}"),
    ("async gathers", "all_gather_async_share", "{:.0%}"),
    ("bound", "bound", "{}"),
    ("MFU hidden", "mfu_bound_hidden", "{:.3f}"),
    ("exposed", "mfu_bound_exposed", "{:.3f}"),
    ("s / step", "step_seconds", "{:.3g}"),
    ("hours", "hours", "{:.1f}"),
    ("$", "dollars", "{:,.0f}"),
    ("compile CPU-s", "compile_cpu_seconds", "{:.0f}"),
    ("lower CPU-s", "lower_cpu_seconds", "{:.1f}"),
    ("RSS GiB", "peak_rss_gib", "{:.2f}"),
)


@dataclass(frozen=True)
class Row:
    """One job on one slice, and what its figures are held against."""

    name: str
    arguments: tuple[str, ...]
    at_most: dict[str, float] = field(default_factory=dict)
    at_least: dict[str, float] = field(default_factory=dict)


_COMPILING: dict[str, float] = {"compile_cpu_seconds": 90, "lower_cpu_seconds": 2, "peak_rss_gib": 3}
BARS = (
    Row(
        "R1 v4-128",
        ("R1", "--accelerator", "v4-128"),
        {"hbm_gib_per_chip": 16, "recomputation": 1.07, "ici_bytes_per_chip": 11.6e9, **_COMPILING},
        {"all_gather_async_share": 0.8, "mfu_bound_exposed": 0.87},
    ),
    Row("R1 v4-128, full remat", ("R1", "--accelerator", "v4-128", "--remat", "full"), {"hbm_gib_per_chip": 5.5}),
    Row("R1 v6e-256", ("R1", "--accelerator", "v6e-256")),
    Row(
        "R7 v4-128, full remat, 2 microbatches",
        ("R7", "--accelerator", "v4-128", "--remat", "full", "--microbatches", "2"),
        {"hbm_gib_per_chip": 26.5},
    ),
    Row("R7 v4-128", ("R7", "--accelerator", "v4-128")),
    Row("R7 v5p-128", ("R7", "--accelerator", "v5p-128")),
    Row("R7 v5e-256", ("R7", "--accelerator", "v5e-256")),
    Row("R7 v6e-256", ("R7", "--accelerator", "v6e-256")),
    Row("R7 4 x v4-128", ("R7", "--accelerator", "v4-128", "--num-slices", "4")),
)


def measured(row: Row) -> dict[str, Any]:
    """The JSON of the preflight command for one row.

    Raises:
        RuntimeError: the command failed; with its last words.
    """
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "model.preflight", *row.arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{row.name}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def verdicts(row: Row, found: dict[str, Any]) -> list[str]:
    """Each bar with `met` or `MISSED`."""
    held = [(key, limit, "<=", found[key] <= limit) for key, limit in row.at_most.items()]
    held += [(key, limit, ">=", found[key] >= limit) for key, limit in row.at_least.items()]
    return [f"{key} {found[key]:.4g} {sign} {limit:.4g}: {'met' if met else 'MISSED'}" for key, limit, sign, met in held]


def main() -> int:
    """Prints the table; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    options = parser.parse_args()
    print("| job | " + " | ".join(title for title, _, _ in COLUMNS) + " |")
    print("|---|" + "---|" * len(COLUMNS), flush=True)
    results: dict[str, Any] = {}
    lines: list[str] = []
    for row in BARS:
        found = results[row.name] = measured(row)
        cells = []
        for _, key, form in COLUMNS:
            value = found[key]
            if isinstance(value, float) and key.endswith("bytes_per_chip"):
                value /= 1e9
            cells.append("" if value is None else form.format(value))
        print(f"| {row.name} | " + " | ".join(cells) + " |", flush=True)
        lines += [f"{row.name}: {line}" for line in ([] if found["fits"] else ["does not fit: MISSED"]) + verdicts(row, found)]
        lines += [f"{row.name}: {line}" for line in found["advice"]]
    print("\n" + "\n".join(lines))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any("MISSED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
