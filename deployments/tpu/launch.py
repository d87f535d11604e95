"""How a flow run gets its next slice: when no older one can still write, in the zone whose turn it is, or later."""

from __future__ import annotations

import datetime
import socket
import sys
from typing import TYPE_CHECKING

import anyio
import httpx
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from deployments.tpu.decide import Change
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.request import COORDINATOR_PORT, RUN_LABEL, SliceName, labels, log_directory, metadata
from deployments.tpu.seen import attempt_of, place_of

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

    from deployments.tpu.cloud import CloudSlice, CloudTpu, Unavailable
    from deployments.tpu.worker import TPUWorker

GONE_SECONDS = 300.0  # for an older slice of the same run to be gone before a new one may train beside it
HARMLESS = {"SUSPENDED", "FAILED"}  # states in which a slice has no hosts

# What a scheduled run is called while it cannot have a slice. No budget of the run is used.
WAITING_FOR_DELETION = "WaitingForDeletion"
WAITING_FOR_QUOTA = "WaitingForQuota"
WAITING_FOR_API = "WaitingForAPI"
FIRST_PAUSE_SECONDS = 30.0
MAX_PAUSE_SECONDS = 900.0


class Postponed(Exception):
    """No slice can be asked for now: the run is scheduled again in `seconds`, under the name `name`; the message says why."""

    def __init__(self, name: str, why: str, seconds: float) -> None:
        super().__init__(why)
        self.name, self.seconds = name, seconds

    @classmethod
    def growing(cls, name: str, why: str, states: list[State]) -> Postponed:
        """The more often the run was postponed since it last ran, the longer: its history has a place for each of these states."""
        ran = max((state.timestamp for state in states if state.type is StateType.RUNNING), default=None)
        waits = [state for state in states if state.name in _WAITS and (ran is None or state.timestamp > ran)]
        seconds = min(FIRST_PAUSE_SECONDS * 2 ** min(len(waits), 10), MAX_PAUSE_SECONDS)
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        return cls(name, f"{why}; tried again at {at:%H:%M:%S} UTC", seconds)


_WAITS = {WAITING_FOR_DELETION, WAITING_FOR_QUOTA, WAITING_FOR_API}


async def launch(worker: TPUWorker, flow_run: FlowRun, configuration: TPUJobConfiguration) -> str:
    """Asks for the next slice of a flow run, when no older one can still write; returns its full name.

    Raises:
        Postponed: an older slice is not gone, or Cloud TPU has no quota or does not answer.
        Refused: it is not allowed.
    """
    from deployments.tpu.cloud import Unavailable

    states = await worker.client.read_flow_run_states(flow_run.id)
    zone = zone_to_ask(configuration.places, states)
    # Before anything is made: the loop finds it there whatever becomes of this run, and of what is asked below.
    worker.places |= {configuration.parent(place) for place in configuration.places}
    try:
        older = await _older_slices(worker, flow_run, configuration)
        await _wait_until_gone(worker, older, states)
    except Unavailable as error:
        raise Postponed.growing(WAITING_FOR_API, str(error), states) from None
    attempt = 1 + max(attempt_of(name) for name in (flow_run.infrastructure_pid, *(each.name for each in older)))
    cloud = await worker.cloud(configuration.parent(zone))
    try:
        made = await _create(worker, flow_run, configuration, cloud, zone, SliceName(flow_run.id, attempt))
    except Unavailable as error:
        raise elsewhere_or_later(configuration, zone, states, error) from None
    await _give_back_if_ended(worker, flow_run, cloud, made)
    return made


def zone_to_ask(zones: list[str], states: list[State]) -> str:
    """The zone whose turn it is: the next after each that was left, and all of them in turn once each was tried."""
    left = sum(state.name == Change.NEXT_ZONE.value for state in states)
    if left + 1 < len(zones):
        return zones[left]
    waited = sum(state.name in (WAITING_FOR_QUOTA, WAITING_FOR_API) for state in states)
    return zones[(len(zones) - 1 + waited) % len(zones)]


def elsewhere_or_later(configuration: TPUJobConfiguration, zone: str, states: list[State], error: Unavailable) -> Postponed:
    """What becomes of a run whose request was not taken for all of the patience: the next zone, and after the last one a while."""
    from deployments.tpu.cloud import Exhausted
    from deployments.tpu.quota import PAGE

    left, zones = sum(state.name == Change.NEXT_ZONE.value for state in states), configuration.places
    if left + 1 < len(zones):
        return Postponed(Change.NEXT_ZONE.value, f"{error}; trying zone {left + 2} of {len(zones)}", 1.0)
    if not isinstance(error, Exhausted):
        return Postponed.growing(WAITING_FOR_API, str(error), states)
    wanted = f"{configuration.num_slices} x {configuration.accelerator_type}, {configuration.provisioning}, in {zone}"
    why = (
        f"{error}: no quota for {wanted}. Ask for more at {PAGE}{configuration.project or 'PROJECT'}, delete what else uses it, "
        "or name more `zones`"
    )
    return Postponed.growing(WAITING_FOR_QUOTA, why, states)


async def _create(
    worker: TPUWorker, flow_run: FlowRun, configuration: TPUJobConfiguration, cloud: CloudTpu, zone: str, slice_name: SliceName
) -> str:
    from deployments.tpu.worker import where_hosts_log

    name, logs = str(slice_name), log_directory(configuration, flow_run.parameters, slice_name)
    port = _free_port() if configuration.provider == "local" else COORDINATOR_PORT
    made = await cloud.create(
        configuration,
        zone,
        name,
        labels(configuration, flow_run.id, worker.work_pool.name),
        metadata(configuration, dict(flow_run.parameters), sys.executable, port, logs),
    )
    log = worker.get_flow_run_logger(flow_run)
    what = configuration.num_slices, configuration.accelerator_type, configuration.provisioning
    log.info("asked for %d x %s (%s) in %s as %s", *what, zone, name)
    log.info("its hosts log to %s", where_hosts_log(configuration, name, logs))
    return made


async def _older_slices(worker: TPUWorker, flow_run: FlowRun, configuration: TPUJobConfiguration) -> list[CloudSlice]:
    """Slices of the run, in the zones of its form and in the one where its last slice was, which the form may have named before."""
    found: list[CloudSlice] = []
    for parent in sorted({place_of(flow_run), *map(configuration.parent, configuration.places)} - {""}):
        cloud = await worker.cloud(parent)
        found += await cloud.slices(parent, lambda labels: labels.get(RUN_LABEL) == str(flow_run.id))
    return found


async def _wait_until_gone(worker: TPUWorker, older: list[CloudSlice], states: list[State]) -> None:
    """Two slices that train the same run at once would write the same checkpoints. Raises Postponed."""
    from google.api_core.exceptions import GoogleAPICallError

    for each in older:
        cloud, why = await worker.cloud(each.name), ""
        if each.state != "DELETING":
            try:
                await cloud.delete(each.name)
            except GoogleAPICallError as error:
                why = f"; Cloud TPU does not delete it now: {error.message}"
        if each.state in HARMLESS:
            continue
        with anyio.move_on_after(GONE_SECONDS) as patience:
            while await cloud.exists(each.name):
                await anyio.sleep(1.0)
        if patience.cancelled_caught:
            _, project, _, zone, _, name = each.name.split("/")
            remedy = f"`gcloud compute tpus queued-resources delete {name} --project {project} --zone {zone} --force`"
            why = f"waits for the slice {each.name}, which is {each.state}, to be gone{why}. If it stays: {remedy}"
            raise Postponed.growing(WAITING_FOR_DELETION, why, states)


async def _give_back_if_ended(worker: TPUWorker, flow_run: FlowRun, cloud: CloudTpu, made: str) -> None:
    """Deletes a slice whose run was cancelled or deleted while it was asked for; where that fails, the loop does it."""
    from google.api_core.exceptions import GoogleAPICallError

    from deployments.tpu.cloud import Refused, Unavailable

    log = worker.get_flow_run_logger(flow_run)
    try:
        try:
            state = (await worker.client.read_flow_run(flow_run.id)).state
            ended = (state is not None and state.is_final() and state.name) or ""
        except ObjectNotFound:
            ended = "deleted"
        if ended:
            log.warning("deleting %s: the run is %s meanwhile", made, ended)
            await cloud.delete(made)
    except (httpx.HTTPError, GoogleAPICallError, Refused, Unavailable) as error:
        log.warning("cannot see whether %s is still wanted, or delete it (%s); the worker looks again", made, error)


def _free_port() -> int:
    """Simulated hosts share one address, so every slice needs a port of its own."""
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])
