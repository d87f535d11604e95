"""Tasks of lm-eval on any trained model.

    python flows/harness.py artifacts/checkpoints/debug-2b2e... --tasks arc_easy piqa
    python flows/harness.py artifacts/checkpoints/debug-2b2e.../hf --tasks mine --task-dir my_tasks --limit 100

Exit status: 0 done, 1 it broke, 2 the request was wrong, 130 stopped on request.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts flows/ first on the path; the packages are siblings of it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import json
import signal

import tyro
from rich.console import Console
from rich.table import Table

from flows.command_line import named_errors
from flows.flag_errors import parse_flags
from flows.launching import interrupt, one_line_errors
from model.inference_jobs import HarnessJob
from tasks.artifacts import brought_here
from tasks.bucket_runs import model_here
from tasks.experiment import root_place

console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which tasks, on what."""

    checkpoint: tyro.conf.Positional[str]
    """A run's directory (in a bucket, a finished run's), one of its checkpoints/<step>, or a directory with a Hugging Face Llama."""
    tasks: tuple[str, ...]
    """Names of tasks or groups, of lm-eval's own or of --task-dir's."""
    task_dir: Path | None = None
    """A directory of task files (YAML) of your own; relative paths in them begin there."""
    num_fewshot: int | None = None
    """Examples before each question; unset: as each task says."""
    limit: int | None = None
    """So many documents of each task at most; for trying out."""
    batch_size: int = 8
    """Rows of text at once."""
    score_bos: bool = True
    """Likelihoods of whole texts with that of a second BOS, as lm-eval's Hugging Face backend has them; off: of the text alone."""
    root: str | None = None
    """Where the results lie; unset: PREFECT_LLAMA_ROOT, else ./artifacts."""
    force: bool = False
    """Run although the results are there."""


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit status."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return named_errors(lambda: _evaluate(parse_flags(Arguments, arguments, prog="harness.py", description=__doc__)))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _evaluate(options: Arguments) -> int:
    from flows.harness_flow import evaluate_model  # first: it sets what Prefect reads when it is imported
    from flows.temporary_server import use_temporary_server
    from tasks.children import ChildFailed
    from tasks.harness import RESULTS, harness_step

    job = HarnessJob(
        model=model_here(options.checkpoint),
        tasks=options.tasks,
        task_dir=options.task_dir,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        score_bos=options.score_bos,
    )
    harness_step(job)  # what can be refused is refused before a server starts
    one_line_errors()
    use_temporary_server()
    try:
        artifact = evaluate_model(job, root=str(root_place(options.root)), force=options.force)
    except ChildFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if error.named else 1
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 1
    table = Table("metric", "value", show_edge=False, pad_edge=False)
    results = Path(brought_here(artifact).path) / RESULTS
    for name, value in sorted(json.loads(results.read_text(encoding="utf-8"))["metrics"].items()):
        table.add_row(name, f"{value:.6g}")
    console.print(table)
    console.print(f"\n  results  {results}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
