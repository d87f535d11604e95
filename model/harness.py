"""The harness process: `python -m model.harness JOB.json RESULTS.json` runs tasks of lm-eval on one model and writes their metrics.

On standard output, a JSON line for each batch: `{"event": "progress", "what": "likelihoods", "done": REQUESTS, "total": REQUESTS}`.

RESULTS.json: `metrics`, flat, named `lm_eval/<task>/<metric>` and `lm_eval/averages/{macro,micro}_avg_<metric>` as Levanter names them,
and lm-eval's own `results`, `n-samples`, `n-shot` and `versions`.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.child import die_with_parent, emit, exit_status
from model.config_base import nearest
from model.durable import write_json
from model.inference_jobs import HarnessJob
from model.trained_model import TrainedModel

# Of the standard errors that have no formula. lm-eval's own 100,000 take minutes, and tell the error of an error to 0.2 % instead of 2 %.
BOOTSTRAP_SAMPLES = 1000
KEPT = ("results", "groups", "n-samples", "n-shot", "versions")


def run_harness(job: HarnessJob) -> dict[str, Any]:
    """What RESULTS.json holds.

    Raises:
        ValueError: lm-eval is not installed, there is no such task, or the model cannot be opened.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork this process, which has JAX's threads
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        from model.lm_eval_adapter import LmEvalModel
    except ModuleNotFoundError as error:
        raise ValueError(f"lm-eval cannot be imported ({error}): pip install 'prefect-llama[eval]'") from None
    if job.task_dir is not None:
        os.chdir(job.task_dir)  # the paths of data files in task files are relative to the working directory
    manager = TaskManager(include_path=None if job.task_dir is None else str(job.task_dir))
    for name in job.tasks:
        if name not in manager.all_tasks:
            raise ValueError(f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}: give --task-dir for tasks of your own")
    model = LmEvalModel(TrainedModel.open(job.model), batch_size=job.batch_size, score_bos=job.score_bos, tell=partial(emit, "progress"))
    found = simple_evaluate(
        model=model,
        tasks=list(job.tasks),
        num_fewshot=job.num_fewshot,
        limit=job.limit,
        bootstrap_iters=BOOTSTRAP_SAMPLES,
        log_samples=False,
        task_manager=manager,
    )
    assert found is not None  # None is for the other ranks of several processes
    outcome: dict[str, Any] = dict(found)
    kept = {name: outcome[name] for name in KEPT if name in outcome}
    return {"schema": 1, "lm_eval": version("lm_eval"), "metrics": flat_metrics(outcome), **kept}


def flat_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of every task and group, and their averages over the tasks: `macro` each alike, `micro` by documents.

    Standard errors are of single tasks, so there is no average of them. `,none` in a name, for "no filter", is left out.
    """
    metrics: dict[str, float] = {}
    by_metric: dict[str, list[tuple[float, int]]] = defaultdict(list)
    samples = found["n-samples"]
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue  # the alias, or "N/A"
            name = key.removesuffix(",none")
            metrics[f"lm_eval/{task}/{name}"] = float(value)
            if task in samples and "stderr" not in name and name != "sample_len":
                by_metric[name].append((float(value), int(samples[task]["effective"])))
    for name, values in by_metric.items():
        metrics[f"lm_eval/averages/macro_avg_{name}"] = sum(value for value, _ in values) / len(values)
        metrics[f"lm_eval/averages/micro_avg_{name}"] = sum(value * count for value, count in values) / sum(count for _, count in values)
    return metrics


def main(job_file: Path, results: Path) -> int:
    """Runs one job; returns the exit status."""
    die_with_parent()
    return exit_status(lambda: write_json(results, run_harness(HarnessJob.model_validate_json(job_file.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m model.harness JOB.json RESULTS.json")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]).absolute()))
