"""compare-llama: runs side by side, one plot of their losses, and a scaling law fitted to them.

python flows/compare.py artifacts                                   every run below a root
python flows/compare.py artifacts/sweeps/debug-... --out compared   a sweep's arms, with comparison.png, .html and .json
python flows/compare.py 'artifacts/checkpoints/ladder-*' --fit      a scaling law over them
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts flows/ first on the path; the packages are siblings of it. The command line needs no Prefect.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from flows.compare_command import main

    sys.exit(main(sys.argv[1:]))

import flows.prefect_settings  # noqa: F401, I001  (before Prefect reads its settings)

import tempfile

from prefect import flow, get_run_logger
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact, create_table_artifact

from tasks.comparison import Comparison
from tasks.prefect_artifacts import image_url, keep
from tasks.scaling_law import LawName


@flow(name="compare-llama")
def compare_llama(runs: list[str], fit: bool = False, law: LawName = "auto", out: str | None = None) -> list[str]:
    """Compares training runs and keeps table, plot and law as artifacts of this flow run; returns the files it wrote to `out`.

    Args:
        runs: Directories of runs or sweeps, roots, globs of these, or gs://bucket/prefix.
        fit: Fit a scaling law to the finished runs.
        law: Of parameters and tokens, or of compute; auto takes the first where the runs decide it.
        out: A directory for the plots and numbers. Unset: the artifacts alone.

    Raises:
        ValueError: there is no such run, or the runs do not decide the law.
    """
    comparison = Comparison.of(runs, fit=fit, law=law)
    columns, lines = comparison.table()
    keep(lambda: create_table_artifact([dict(zip(columns, line, strict=True)) for line in lines], key="compared-runs", description="Runs"))
    for line in comparison.law_lines():
        get_run_logger().info(line)
    with tempfile.TemporaryDirectory() as place:
        files = comparison.save(Path(out or place))
        for path in files:
            if path.suffix == ".png":
                keep(lambda path=path: create_image_artifact(image_url(path), key=path.stem, description=path.stem))
    if comparison.law is not None:
        text = "\n".join(f"- {line}" for line in comparison.law_lines())
        keep(lambda: create_markdown_artifact(text, key="scaling-law-numbers", description="Scaling law"))
    if out is None:
        return []
    for path in files:
        if path.suffix == ".html":
            keep(lambda path=path: create_link_artifact(path.absolute().as_uri(), link_text=str(path), key=f"{path.stem}-page"))
    return [str(path) for path in files]
