"""Training on a work pool: one flow run of `pretrain` for the training step, found again by whoever asks for it next.

The run is asked for under a key made of the step's fingerprint, so a control flow that was killed and started again adopts the run
that already trains. What it trained is believed when its last checkpoint and its outcome lie where this process reads them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from model.checkpoint_files import steps_in
from model.job import TrainingJob
from model.metrics import read_json_lines
from model.mixture_store import MixtureTokenizer
from tasks.bucket_runs import fetch_records
from tasks.caching import assert_still_owner, run_logger
from tasks.children import ChildFailed, ChildStopped, stopping
from tasks.compile_ahead import CompileAhead
from tasks.formatting import duration
from tasks.pool_checks import check_before_asking, on_slices_of
from tasks.pool_settings import PoolSettings, job_variables
from tasks.prefect_artifacts import keep
from tasks.server_time import server_time
from tasks.trainer_child import OUTCOME_FILE, read_outcome

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

PRETRAIN = "pretrain"
POLL_SECONDS = 2.0
PROGRESS_SECONDS = 30.0
API_SECONDS = 900.0  # without an answer of the Prefect API before following a run is given up; the run itself goes on
CRASH_SECONDS = 150.0  # in which a worker may try a crashed run again; more than `deployments.tpu.decide.RETRY_AGE_SECONDS`
CANCEL_SECONDS = 120.0
GAVE_UP = "GaveUp"


def train_on_pool(job: TrainingJob, pool: str) -> None:
    """Trains on `pool` to the last step, adopting a run of the same job that is already there.

    Raises:
        ChildFailed: the run failed; the message says where and why.
        ChildStopped: it was cancelled, or this process was told to stop.
        ValueError: the pool or its deployment is not there.
    """
    with get_client(sync_client=True) as client:
        deployment = pretrain_deployment(client, pool)
        variables = job_variables(job.train)
        settings = check_before_asking(client, job, deployment, variables, tell=run_logger().info)
        run = ask_for_run(client, job, deployment, variables)
        publish_link(run, job.name)
        with compiling_ahead(job, settings) as ahead:
            Following(client, job, run.id, ahead).until_final()


def publish_link(run: FlowRun, name: str) -> None:
    """A link to the run that trains, also where an earlier control flow asked for it: Prefect shows it as that one's child alone."""
    page = url_for(run)
    if page is not None:  # no server of this process has pages
        keep(lambda: create_link_artifact(page, run.name, key="training-run", description=f"Training {name} on the work pool"))


@contextmanager
def compiling_ahead(job: TrainingJob, settings: PoolSettings | None) -> Iterator[CompileAhead | None]:
    """Inside it the evaluation is compiled for the pool's slices, where they are TPUs and this machine has a compiler for them."""
    if settings is None or settings.provider != "cloud" or find_spec("libtpu") is None:
        yield None
        return
    model = job.model.with_vocab(MixtureTokenizer.read(job.mixture).vocab_size)
    with CompileAhead(job.name, model, on_slices_of(settings, job.train), run_logger()) as ahead:
        yield ahead


def pretrain_deployment(client: SyncPrefectClient, pool: str) -> DeploymentResponse:
    """The deployment of the flow `pretrain` on `pool`.

    Raises:
        ValueError: there is no such pool, or no such deployment on it; with the command that makes it.
    """
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        there = ", ".join(sorted(each.name for each in client.read_work_pools())) or "none"
        raise ValueError(
            f"pool={pool!r}: no such work pool (there are: {there}): `prefect work-pool create --type tpu {pool}` makes it"
        ) from None
    found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[PRETRAIN])))
    mine = [each for each in found if each.work_pool_name == pool]
    if not mine:
        raise ValueError(
            f"pool={pool!r} has no deployment of the flow {PRETRAIN!r}: run `prefect deploy --all`, with `work_pool.name: {pool}`"
        )
    return sorted(mine, key=lambda each: (each.name != pool, each.name))[0]


def ask_for_run(client: SyncPrefectClient, job: TrainingJob, deployment: DeploymentResponse, variables: Mapping[str, Any]) -> FlowRun:
    """The run that trains this job: the one that is there, or a new one where the ones before failed."""
    for attempt in itertools.count():
        run = run_deployment(
            name=deployment.id,
            parameters={"job": job.model_dump(mode="json")},
            flow_run_name=f"pretrain-{job.name}",
            idempotency_key=f"{job.fingerprint}:{attempt}",
            tags=["train-llama", f"run:{job.name}"],
            job_variables=dict(variables),
            timeout=0,
        )
        assert not isinstance(run, Coroutine)  # Prefect's annotation covers its asynchronous use too
        state = run.state
        if state is None or not state.is_final():
            return run
        if state.is_completed() and finished(job):
            return run
        if may_be_tried_again(client, run):
            return run
    raise AssertionError("unreachable")


def finished(job: TrainingJob) -> bool:
    """Whether the last checkpoint and the outcome are there."""
    fetch_records(job, [OUTCOME_FILE])
    found, last = read_outcome(job.directory), job.train.num_train_steps
    return found is not None and found.get("step") == last and last in steps_in(job.checkpoints)


def may_be_tried_again(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a worker may still take a crashed run up again, by the server's clock; this machine's may be minutes away from it."""
    state = run.state
    if state is None or not state.is_crashed() or state.name == GAVE_UP:
        return False
    try:
        now = server_time(client)
    except httpx.HTTPError:  # nobody knows yet: whoever reads the run next time asks again
        return True
    return (now - state.timestamp).total_seconds() < CRASH_SECONDS


class Following:
    """Follows one run to its end, through an API that is away for a while. Told to stop, it cancels the run and waits."""

    def __init__(self, client: SyncPrefectClient, job: TrainingJob, run: UUID, ahead: CompileAhead | None = None) -> None:
        self._client, self._job, self._run, self._ahead = client, job, run, ahead
        self._log = run_logger()
        self._said = ""
        self._progress_at = time.monotonic()

    def until_final(self) -> None:
        """Returns when the run is complete. Raises ChildFailed or ChildStopped otherwise."""
        self._log.info("training runs as flow run %s on the work pool", self._run)
        cancelled_at: float | None = None
        while True:
            run = self._read()
            state = run.state
            assert state is not None
            self._tell(run)
            if state.is_final() and not may_be_tried_again(self._client, run):
                break
            if cancelled_at is None and stopping() and self._cancel(run):
                cancelled_at = time.monotonic()
            if cancelled_at is not None and time.monotonic() - cancelled_at > CANCEL_SECONDS:
                raise ChildStopped(
                    f"flow run {run.name} was told to stop and has not answered: look for its slice, which may still cost money"
                )
            if self._ahead is not None:
                self._ahead.look()
            assert_still_owner()
            time.sleep(POLL_SECONDS if cancelled_at is None else 0.5)
        if state.is_completed():
            if not finished(self._job):
                raise ChildFailed(f"flow run {run.name} is complete, and its last checkpoint is not in {self._job.shared}", named=True)
            return
        if state.is_cancelled():
            steps = steps_in(self._job.checkpoints)
            saved = f"and saved at step {steps[0]} of {self._job.train.num_train_steps}" if steps else "before its first checkpoint"
            raise ChildStopped(f"training {self._job.name} was cancelled {saved}: run the same command again to continue")
        raise ChildFailed(f"flow run {run.name} {state.name}: {state.message}", named=state.is_failed())

    def _cancel(self, run: FlowRun) -> bool:
        """Whether the run was cancelled: not where the API is away, which is asked again."""
        try:
            self._client.set_flow_run_state(run.id, Cancelling())
        except httpx.HTTPError as error:
            self._log.warning("flow run %s cannot be cancelled yet, and goes on: the Prefect API does not answer (%s)", run.name, error)
            return False
        self._log.warning("cancelling flow run %s: it saves a checkpoint and gives its slice back", run.name)
        return True

    def _read(self) -> FlowRun:
        began = time.monotonic()
        while True:
            try:
                return self._client.read_flow_run(self._run)
            except httpx.HTTPError as error:
                if time.monotonic() - began > API_SECONDS:
                    raise ChildFailed(
                        f"the Prefect API did not answer for {API_SECONDS / 60:.0f} minutes ({error}); flow run {self._run} may still train"
                    ) from None
                time.sleep(POLL_SECONDS)

    def _tell(self, run: FlowRun) -> None:
        assert run.state is not None
        said = f"{run.state.name}" + (f": {run.state.message}" if run.state.message else "")
        if said != self._said:
            self._said = said
            self._log.info("flow run %s is %s", run.name, said)
        # in a bucket the curves are with the checkpoints; the run's own log and progress bar tell how far it is
        if self._job.bucket is None and run.state.is_running() and time.monotonic() - self._progress_at > PROGRESS_SECONDS:
            self._progress_at = time.monotonic()
            rows = read_json_lines(self._job.directory / "metrics.jsonl")
            if rows:
                running = duration(time.time() - run.start_time.timestamp()) if run.start_time else "?"
                self._log.info(
                    "step %d/%d  loss %s  running for %s",
                    rows[-1]["step"],
                    self._job.train.num_train_steps,
                    rows[-1].get("train/loss"),
                    running,
                )
