"""What a job and a work pool of type `tpu` must agree on, looked at before a slice is asked for: afterwards every mistake costs money.

What the slice's own service account may do cannot be seen from here: docs/tpu.md says what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import LlamaConfig
from model.mixture_store import MixtureTokenizer
from model.preflight.prices import cost
from model.slices import slice_named
from model.train_config import SimpleTrainConfig
from tasks.bucket_checks import location_finding, use_finding
from tasks.bucket_runs import bytes_to_fetch
from tasks.findings import Finding, refuse
from tasks.places import ObjectPath, Place, place_of
from tasks.pool_settings import TPU, PoolSettings
from tasks.preflight import preflight, refuse_what_does_not_fit, without_chosen_options

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

    from model.job import TrainingJob

HOST_DISK_BYTES = 75e9  # of the 100 GB of a TPU VM's boot disk, what system and image leave
IN_THE_POOL = "in the work pool's form or in the deployment's job_variables"


def check_before_asking(
    client: SyncPrefectClient,
    job: TrainingJob,
    deployment: DeploymentResponse,
    variables: Mapping[str, Any],
    *,
    tell: Callable[[str], None],
) -> PoolSettings | None:
    """Refuses a job that the deployment's work pool could only waste money on; nothing where a run of the job is there to be adopted.

    variables: job variables of the run. tell: gets warnings, and how far preflight is. Returns what a pool of type `tpu` will ask for.

    Raises:
        ValueError: naming the fields, their values and what to change.
    """
    assert deployment.work_pool_name is not None
    work_pool = client.read_work_pool(deployment.work_pool_name)
    if work_pool.type != TPU:
        return None
    settings = PoolSettings.of(work_pool, deployment.job_variables, variables)
    if runs_already(client, job, deployment):
        return settings
    check_accelerator_type(settings)
    model = job.model.with_vocab(MixtureTokenizer.read(job.mixture).vocab_size)
    if settings.provider == "cloud":
        refuse(place_findings(settings, place_of(job.bucket or job.directory)), tell)
        check_disk(settings, job)
        check_fit_and_cost(settings, job.name, model, job.train, tell)
    return settings


def runs_already(client: SyncPrefectClient, job: TrainingJob, deployment: DeploymentResponse) -> bool:
    """Whether a run of this job was asked for and has not ended."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import TERMINAL_STATES, StateType

    live = [state for state in StateType if state not in TERMINAL_STATES]
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=live))),
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
    )
    return any((run.idempotency_key or "").startswith(f"{job.fingerprint}:") for run in runs)


def check_accelerator_type(settings: PoolSettings) -> None:
    """Raises ValueError where the pool asks for a slice that Cloud TPU does not have, with the names nearest to it."""
    if settings.accelerator_type is None:
        raise ValueError(f"accelerator_type of the work pool {settings.pool!r} is not set: name a slice such as v4-128 {IN_THE_POOL}")
    try:
        slice_named(settings.accelerator_type)
    except ValueError as error:
        raise ValueError(
            f"accelerator_type={settings.accelerator_type!r} of the work pool {settings.pool!r}: {error}: correct it {IN_THE_POOL}"
        ) from None


def place_findings(settings: PoolSettings, place: Place) -> Iterator[Finding]:
    """Whether slices of the pool can read and write there, and at what price. Raises StorageError where a bucket does not answer."""
    if isinstance(place, Path):
        yield Finding(
            "root",
            "fail",
            f"--root={place} is a directory of this machine, which slices of the work pool {settings.pool!r} (provider=cloud) cannot see",
            "give --root gs://bucket/prefix, in the region of the pool's zones",
        )
        return
    if settings.zones:
        yield location_finding(place, list(settings.zones))
    yield use_finding(place)


def check_disk(settings: PoolSettings, job: TrainingJob) -> None:
    """Raises ValueError where the hosts' disks have no room for the tokens that each of them brings."""
    if settings.cache_in_memory or job.mixture_bucket is None:
        return
    needed = bytes_to_fetch(ObjectPath.parse(job.mixture_bucket), job.mixture)
    if needed > HOST_DISK_BYTES:
        raise ValueError(
            f"each host of a slice brings the {needed / 1e9:,.0f} GB of tokens of {job.mixture.name} to its disk, which has room for about "
            f"{HOST_DISK_BYTES / 1e9:.0f} GB: set cache_in_memory=true {IN_THE_POOL}, as TPU VMs have 190 GB of memory and more"
        )


def check_fit_and_cost(
    settings: PoolSettings, name: str, model: LlamaConfig, train: SimpleTrainConfig, tell: Callable[[str], None]
) -> None:
    """Refuses a job that does not fit the pool's slices, or that takes more of them than `max_cost` buys. model: with its vocabulary.

    The train step is compiled for the slice where it was not yet, which takes minutes. Without a compiler nothing is known, which is told.

    Raises:
        ValueError: with the gigabytes or the dollars.
    """
    found = preflight(name, model, without_chosen_options(on_slices_of(settings, train)), tell=tell)
    if found is None:
        return
    refuse_what_does_not_fit(found)
    if found.hours is not None:
        check_cost(settings, name, found.hours, tell)


def on_slices_of(settings: PoolSettings, train: SimpleTrainConfig) -> SimpleTrainConfig:
    """The training on what the pool asks for."""
    asked = {"accelerator_type": settings.accelerator_type, "slice_count": settings.num_slices}
    return SimpleTrainConfig(**{**dict(train), **asked})


def check_cost(settings: PoolSettings, name: str, hours: float, tell: Callable[[str], None]) -> None:
    """Refuses a job of so many hours where the pool's slices cost more than `max_cost` for that time; tells the price otherwise."""
    assert settings.accelerator_type is not None
    tpu_slice = slice_named(settings.accelerator_type)
    price = cost(tpu_slice, settings.num_slices, hours, "spot" if settings.provisioning == "spot" else "on_demand")
    slices = f"{settings.num_slices} x {tpu_slice.name}"
    if settings.max_cost is None or price.dollars <= settings.max_cost:
        tell(f"{name} takes {hours:.3g} hours of {slices} at least: {price}")
        return
    raise ValueError(
        f"max_cost={settings.max_cost:g} of the work pool {settings.pool!r} does not buy {name}, which takes {hours:.3g} hours of {slices} "
        f"at least: {price}: raise max_cost {IN_THE_POOL}, or lower train.num_train_steps"
    )
