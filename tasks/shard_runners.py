"""Runs mapped shard tasks on the task runner of one's choice: threads, processes, or a Dask cluster; one result at a time."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import Task, unmapped
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from tasks.children import stopping
from tasks.planning import usable_cores
from tasks.shard_tokenizer import ShardJob, ShardResult, Stopped, StoreSpec
from tasks.sources import DataError
from tasks.tokenize_config import TokenizeConfig

_POLL_SECONDS = 0.25


class _QuietShards(logging.Filter):
    """A line for each of a thousand shards hides the line that matters: the step itself says what came of them, by name."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Leaves out what Prefect says of the end of a shard; that one is tried again stays."""
        if not str(getattr(record, "task_run_name", "")).startswith("shard "):
            return True
        return not record.getMessage().startswith(("Finished in state", "Task run failed with exception"))


_quiet_shards = _QuietShards()


def run_mapped(
    task: Task[[StoreSpec, ShardJob], ShardResult], spec: StoreSpec, jobs: Sequence[ShardJob], execution: TokenizeConfig
) -> Iterator[tuple[ShardJob, ShardResult | BaseException]]:
    """Every job with its result, or with the error of its last try, as they finish.

    Told to stop, it ends early: shards that run stop between two batches, the others are not begun.
    Raises DataError where the runner is not installed. Outside of a flow, where Prefect has no run to add tasks to, the
    shards are made one after the other in this thread.
    """
    if FlowRunContext.get() is None:
        yield from ((job, _outcome_of(task, spec, job)) for job in jobs if not stopping())
        return
    logging.getLogger("prefect.task_runs").addFilter(_quiet_shards)
    finished: queue.SimpleQueue[int] = queue.SimpleQueue()
    with make_runner(execution, len(jobs)) as runner:
        # Prefect's annotation of `map` wants a task that may be a coroutine
        retried: Any = task.with_options(retries=execution.tries - 1)
        futures: list[PrefectFuture[ShardResult]] = list(runner.map(retried, {"spec": unmapped(spec), "job": list(jobs)}))
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: finished.put(number))
        left = len(jobs)
        while left and not stopping():
            try:
                number = finished.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            left -= 1
            outcome: Any = futures[number].result(raise_on_failure=False)
            yield jobs[number], outcome


def make_runner(execution: TokenizeConfig, num_jobs: int) -> TaskRunner[Any]:
    """The task runner of the configuration. Raises DataError where Dask is asked for and not installed."""
    workers = min(execution.workers or usable_cores(), max(num_jobs, 1))
    if execution.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=workers)  # pyright: ignore[reportReturnType]
    if execution.runner == "processes":
        return ProcessPoolTaskRunner(max_workers=workers)
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise DataError("tokenize.runner='dask' needs the package prefect-dask: install prefect-llama[dask]") from None
    if execution.dask_address is not None:
        return DaskTaskRunner(address=execution.dask_address)
    return DaskTaskRunner(cluster_kwargs={"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"})


def _outcome_of(task: Task[[StoreSpec, ShardJob], ShardResult], spec: StoreSpec, job: ShardJob) -> ShardResult | BaseException:
    try:
        return task.fn(spec, job)
    except (ValueError, OSError, Stopped) as error:
        return error
