"""What can be wrong with a work pool before a run on it: `python flows/train.py doctor --pool NAME`.

Cloud TPU itself is looked at by `deployments.tpu.doctor`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from model.train_config import SimpleTrainConfig
from tasks.bucket_checks import clock_finding, storage_clock_finding
from tasks.findings import Finding, refuse
from tasks.places import Place
from tasks.pool_checks import check_accelerator_type, place_findings
from tasks.pool_settings import TPU, PoolSettings, job_variables

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def server_findings(client: SyncPrefectClient) -> Iterator[Finding]:
    """The Prefect server: whether it answers, its version, its clock."""
    import prefect

    before = time.time()
    try:
        answer = client.request("GET", "/admin/version")
    except httpx.HTTPError as error:
        yield Finding(
            "prefect server",
            "fail",
            f"{client.api_url} does not answer ({error})",
            "start it (`prefect server start`), or correct PREFECT_API_URL",
        )
        return
    after = time.time()
    theirs, ours = str(answer.json()), prefect.__version__
    same = theirs.split(".")[:2] == ours.split(".")[:2]
    remedy = "" if same else "install the same version of Prefect on both: a client newer than its server fails in odd ways"
    yield Finding("prefect server", "ok" if same else "warn", f"{client.api_url} runs Prefect {theirs}, this machine {ours}", remedy)
    yield clock_finding("clock, prefect server", answer.headers.get("Date"), before, after)


def pool_findings(client: SyncPrefectClient, pool: str) -> Iterator[Finding]:
    """The work pool: whether it is there, takes runs, has a worker that lives and the deployment that training asks for."""
    from prefect.client.schemas.objects import WorkerStatus

    from tasks.pool_training import pretrain_deployment

    try:
        deployment = pretrain_deployment(client, pool)
    except ValueError as error:
        yield Finding("deployment", "fail", str(error))
    else:
        yield Finding("deployment", "ok", f"training asks for {deployment.name!r} of the flow pretrain")
    if not has_pool(client, pool):
        return
    work_pool = client.read_work_pool(pool)
    if work_pool.is_paused:
        yield Finding("work pool", "fail", f"the work pool {pool!r} is paused", f"`prefect work-pool resume {pool}`")
    else:
        limit = "no limit" if work_pool.concurrency_limit is None else f"at most {work_pool.concurrency_limit}"
        yield Finding("work pool", "ok", f"{pool!r} of type {work_pool.type}, {limit} of runs at once")
    workers = client.read_workers_for_work_pool(pool)
    online = sorted(worker.name for worker in workers if worker.status == WorkerStatus.ONLINE)
    if online:
        yield Finding("worker", "ok", f"online: {', '.join(online)}")
    else:
        detail = f"no worker of the work pool {pool!r} is online, so nothing would ask for slices, or delete them"
        yield Finding("worker", "fail", detail, f"`prefect worker start --pool {pool}`, on a machine that stays up")


def has_pool(client: SyncPrefectClient, pool: str) -> bool:
    """Whether the server has such a work pool."""
    return pool in {each.name for each in client.read_work_pools()}


def check_pool(pool: str, root: Place, train: SimpleTrainConfig, *, tell: Callable[[str], None]) -> None:
    """Refuses, when a run begins, what training would be refused for when its data is ready, hours later.

    Raises:
        ValueError: naming the fields, their values and what to change.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        settings = settings_of(client, pool, job_variables(train))
    if settings is not None and settings.provider == "cloud":
        refuse(place_findings(settings, root), tell)


def settings_of(client: SyncPrefectClient, pool: str, variables: Mapping[str, Any] | None = None) -> PoolSettings | None:
    """What slices of a pool of type tpu are asked for with; None for a pool of another type. variables: a run's own job variables.

    Raises:
        ValueError: there is no such pool or deployment, or a value of it is wrong.
    """
    from tasks.pool_training import pretrain_deployment

    deployment = pretrain_deployment(client, pool)
    work_pool = client.read_work_pool(pool)
    if work_pool.type != TPU:
        return None
    settings = PoolSettings.of(work_pool, deployment.job_variables, variables or {})
    check_accelerator_type(settings)
    return settings


def storage_findings(settings: PoolSettings, root: Place) -> Iterator[Finding]:
    """Whether slices of the pool can have their artifacts below `root`, and how far Google's clock is."""
    if settings.provider == "cloud":
        try:
            yield from place_findings(settings, root)
        except OSError as error:
            yield Finding("bucket", "fail", f"--root={root}: {error.strerror or error}")
    if not isinstance(root, Path):
        try:
            yield storage_clock_finding(root)
        except OSError as error:
            yield Finding("clock, storage", "fail", f"--root={root}: {error.strerror or error}")
