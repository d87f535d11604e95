"""The table of a sweep in the Prefect UI."""

from __future__ import annotations

import re

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from tasks.prefect_artifacts import keep
from tasks.sweep_table import SweepTable


def publish_table(table: SweepTable) -> None:
    """Keeps the table as it is now as the newest version of its artifact; the summary when nothing is left to do."""
    key = "sweep-" + re.sub(r"[^a-z0-9]+", "-", table.name.lower()).strip("-")
    rows = [dict(zip(table.columns(), line, strict=True)) for line in table.lines()]
    keep(lambda: create_table_artifact(rows, key=key, description=f"Arms of {table.name}: {table.headline()}"))
    if all(row.state in ("finished", "failed", "left out") for row in table.rows):
        keep(lambda: create_markdown_artifact(f"{table.headline()}\n\n`{table.place}`", key=f"{key}-summary", description="Summary"))
