"""Slices that nobody needs: of runs that ended, went on to another slice, or were deleted, where no worker looked after them."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from prefect.exceptions import ObjectNotFound

from deployments.tpu.decide import FINAL
from deployments.tpu.request import POOL_LABEL, SliceName

# States of a run whose slice is of no use any more. One that is scheduled gets a new slice; one that is cancelled has had its time to save.
# A run that is pending or running is left alone: no worker need live while it trains, and one that went silent is crashed by the automation
# of `deployments.automations`, which makes it one of these.
OVER = FINAL | {"SCHEDULED", "CANCELLING"}

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from deployments.tpu.cloud import CloudSlice, CloudTpu


async def unneeded_slices(cloud: CloudTpu, client: PrefectClient, parent: str, minutes: float) -> dict[str, str]:
    """Slices of `parent` that nobody needs, by full name, and why; only what has been so for `minutes`, which is a worker's time to act.

    Slices that no tpu worker made are never among them.
    """
    found: dict[str, str] = {}
    for each in await cloud.slices(parent, lambda labels: POOL_LABEL in labels):
        why = await why_unneeded(each, client, minutes)
        if why is not None:
            found[each.name] = why
    return found


async def why_unneeded(each: CloudSlice, client: PrefectClient, minutes: float) -> str | None:
    """Why nobody needs a slice; None where somebody may."""
    name = SliceName.parse(each.name)
    now = datetime.datetime.now(datetime.UTC)
    patience = datetime.timedelta(minutes=minutes)
    if name is None or each.state == "DELETING" or now - each.created < patience:
        return None
    try:
        run = await client.read_flow_run(name.flow_run)
    except ObjectNotFound:
        return "its flow run was deleted, or belongs to another Prefect server"
    newest = SliceName.parse(run.infrastructure_pid or "")
    if newest is not None and newest.attempt > name.attempt:
        return f"its run {run.name} went on to attempt {newest.attempt}"
    if run.state is not None and run.state.type.value in OVER and now - run.state.timestamp >= patience:
        return f"its run {run.name} is {run.state.name} since {run.state.timestamp:%Y-%m-%d %H:%M} UTC"
    return None
