"""Shards on threads, processes and a Dask cluster: the same bytes; retries for what may pass, none for what stays bad."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness

from tasks.children import allow_children, stop_children
from tasks.datasets import DataError
from tasks.shard_runners import make_runner, run_mapped
from tasks.shard_tokenizer import ShardJob, ShardResult, StoreSpec
from tasks.tokenization import tokenize_body, tokenize_shard
from tasks.tokenize_config import TokenizeConfig
from tests.small_run import SmallRun, tree

LINES = {f"{name}.txt": [f"document {number} of file {name}" for number in range(30)] for name in "abcdefgh"}


@pytest.fixture(scope="module", autouse=True)
def server() -> Any:
    """One temporary API for the tests of this file."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


def tokenized(made: SmallRun, directory: Path, execution: TokenizeConfig) -> dict[str, str]:
    """The files of a store made inside a flow and a task, as the real job makes it."""
    config = made.tokens.config.model_copy(update={"execution": execution})
    step = type(made.tokens)(made.tokens.kind, made.tokens.name, config, made.tokens.upstream, made.tokens.code_version)
    directory.mkdir()

    @task(persist_result=False)
    def body() -> None:
        tokenize_body(step, directory, made.inputs)

    @flow
    def run() -> None:
        body.submit().result()

    run()
    return tree(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("runners") / "root", LINES)


def test_the_bytes_do_not_depend_on_the_runner_or_the_number_of_workers(made: SmallRun, tmp_path: Path) -> None:
    directory = tmp_path / "alone"
    directory.mkdir()
    tokenize_body(made.tokens, directory, made.inputs)
    alone = tree(directory)
    assert len(alone) >= 8 * 2 * 3
    choices = [{"workers": 1}, {"workers": 2}, {"workers": 4}, {"runner": "processes", "workers": 2}, {"runner": "dask", "workers": 2}]
    for number, choice in enumerate(choices):
        execution = TokenizeConfig.model_validate(choice)
        assert tokenized(made, tmp_path / str(number), execution) == alone, choice


def outcomes(work: Any, tmp_path: Path, execution: TokenizeConfig, count: int = 4) -> dict[int, Any]:
    """What `work(job)` ended with, by shard, when it is mapped as the shard task is."""
    spec = StoreSpec(directory=str(tmp_path), tokenizer="", digest="", reading={})  # pyright: ignore[reportArgumentType]
    jobs = [ShardJob(shard=number, of=count, key="", files=(), source_bytes=1) for number in range(count)]

    @flow
    def run() -> dict[int, Any]:
        mapped = task(lambda spec, job: work(job), name="work", persist_result=False)
        mapped = mapped.with_options(retry_condition_fn=tokenize_shard.retry_condition_fn, retry_delay_seconds=0)
        return {job.shard: outcome for job, outcome in run_mapped(mapped, spec, jobs, execution)}

    return run()


def result(job: ShardJob) -> ShardResult:
    return ShardResult(shard=job.shard, documents=1, tokens=1, source_bytes=1, kept=False)


def test_what_may_pass_is_tried_again_and_what_stays_bad_is_not(tmp_path: Path) -> None:
    tries: dict[int, int] = {}

    def work(job: ShardJob) -> ShardResult:
        tries[job.shard] = tries.get(job.shard, 0) + 1
        if job.shard == 0:
            raise DataError("bad text")
        if job.shard == 1 and tries[1] < 3:
            raise OSError(5, "hiccup")
        if job.shard == 2:
            raise OSError(28, "full")
        return result(job)

    found = outcomes(work, tmp_path, TokenizeConfig(tries=3))
    assert tries == {0: 1, 1: 3, 2: 1, 3: 1}
    assert isinstance(found[0], DataError)
    assert isinstance(found[1], ShardResult)
    assert isinstance(found[2], OSError)
    assert found[2].errno == 28


def test_told_to_stop_no_further_shard_is_begun(tmp_path: Path) -> None:
    begun: list[int] = []

    def work(job: ShardJob) -> ShardResult:
        begun.append(job.shard)
        stop_children()
        time.sleep(0.5)
        return result(job)

    try:
        found = outcomes(work, tmp_path, TokenizeConfig(workers=1), count=8)
    finally:
        allow_children()
    assert len(begun) <= 2
    assert len(found) <= 2


def test_dask_that_is_not_installed_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prefect_dask", None)
    with pytest.raises(DataError, match=r"tokenize\.runner='dask' needs the package prefect-dask: install prefect-llama\[dask\]"):
        make_runner(TokenizeConfig(runner="dask"), 3)
    with pytest.raises(ValueError, match="set the runner to 'dask'"):
        TokenizeConfig(dask_address="tcp://x:1")


def test_never_more_workers_than_shards() -> None:
    assert make_runner(TokenizeConfig(workers=9), 3)._max_workers == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert make_runner(TokenizeConfig(), 99)._max_workers == len(os.sched_getaffinity(0))  # pyright: ignore[reportAttributeAccessIssue]
