"""What can be wrong with Cloud TPU before a run: whether it answers this account, offers the pool's slice in each zone, and so many."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from deployments.tpu.quota import quota_findings
from deployments.tpu.worker import API_ADDRESS
from tasks.findings import Finding
from tasks.pool_settings import PoolSettings

if TYPE_CHECKING:
    from deployments.tpu.cloud import CloudTpu

ANSWER_SECONDS = 30.0


def cloud_findings(settings: PoolSettings) -> list[Finding]:
    """Everything that can be asked of Cloud TPU about the slices of a pool, without asking for one."""
    if settings.provider == "local":
        return [Finding("cloud tpu", "ok", "not asked: the pool's slices are simulated on this machine (provider=local)")]
    if not settings.project or not settings.zones:
        lacking = " and ".join(name for name in ("project", "zones") if not getattr(settings, name))
        return [
            Finding(
                "cloud tpu", "fail", f"provider=cloud needs {lacking}", "set it in the work pool's form or the deployment's job_variables"
            )
        ]
    zones = asyncio.run(_all_zones(settings))
    return [*zones, *(quota_findings(settings) if any(zone.state == "ok" for zone in zones) else [])]


async def _all_zones(settings: PoolSettings) -> list[Finding]:
    from deployments.tpu.cloud import CloudTpu, Refused

    try:
        cloud = CloudTpu(os.environ.get(API_ADDRESS))
    except Refused as error:
        return [Finding("cloud tpu", "fail", str(error))]
    return [await _zone(cloud, settings, zone) for zone in settings.zones]


async def _zone(cloud: CloudTpu, settings: PoolSettings, zone: str) -> Finding:
    """Lists what the worker lists, and what the zone offers."""
    from google.api_core.exceptions import GoogleAPICallError

    from deployments.tpu.cloud import Refused, Unavailable

    subject, parent = f"cloud tpu, {zone}", f"projects/{settings.project}/locations/{zone}"
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            offered = await cloud.accelerator_types(parent)
            slices = await cloud.slices(parent, lambda labels: True)
    except Refused as error:
        return Finding(subject, "fail", str(error))
    except (TimeoutError, Unavailable):
        remedy = "look at the network from here to tpu.googleapis.com, and at https://status.cloud.google.com"
        return Finding(subject, "fail", f"Cloud TPU did not answer within {ANSWER_SECONDS:.0f} s", remedy)
    except (GoogleAPICallError, OSError) as error:
        return Finding(subject, "fail", f"Cloud TPU refuses to list {parent} ({error})", "correct project and zones of the work pool")
    if settings.accelerator_type not in offered:
        remedy = "choose one of the zones that https://cloud.google.com/tpu/docs/regions-zones lists for it"
        return Finding(subject, "fail", f"accelerator_type={settings.accelerator_type} is not offered there", remedy)
    return Finding(subject, "ok", f"answers this account, offers {settings.accelerator_type}, has {len(slices)} queued resources")
