"""sweep-tpu: deletes slices that nobody needs. Where a worker of the pool runs, it does that itself; this is for the time when none does.

    prefect deployment run sweep-tpu/sweep-tpu --param project=mine --param 'zones=["us-central2-b"]'

Two Prefect servers must not share the zones of a project: each takes the other's runs for deleted ones.
"""

from __future__ import annotations

import os
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import get_client
from pydantic import Field

from deployments.tpu.form import LOCAL_ZONE, SliceFields
from deployments.tpu.sweep import unneeded_slices
from deployments.tpu.worker import API_ADDRESS, emulator_directory, is_local


@flow(name="sweep-tpu", flow_run_name="sweep-tpu-{project}")
async def sweep_tpu(
    project: str | None = None,
    zones: list[str] | None = None,
    minutes: Annotated[float, Field(ge=0)] = 10.0,
    dry_run: bool = False,
) -> list[str]:
    """Deletes the slices of tpu work pools that no flow run needs any more, and returns their names.

    Args:
        project: Google Cloud project. Unset: the slices simulated on this machine.
        zones: Zones of the project to look at.
        minutes: How long a slice must have been of no use; a worker that lives deletes it sooner.
        dry_run: Only list them.
    """
    from deployments.tpu.cloud import CloudTpu
    from deployments.tpu.emulator.address import running_emulator

    if (project is None) != (not zones):
        raise ValueError(
            f"project={project!r} and zones={zones}: give both, to look at slices of Google Cloud, or neither, for those simulated here"
        )
    log, deleted = get_run_logger(), []
    fields = SliceFields.model_construct(project=project)
    async with get_client() as client:
        for zone in zones or [LOCAL_ZONE]:
            parent = fields.parent(zone)
            cloud = CloudTpu(running_emulator(emulator_directory()) if is_local(parent) else os.environ.get(API_ADDRESS))
            for name, why in (await unneeded_slices(cloud, client, parent, minutes)).items():
                log.warning("%s %s: %s", "would delete" if dry_run else "deleting", name, why)
                if not dry_run:
                    await cloud.delete(name)
                deleted.append({"slice": name, "why": why})
    if deleted:
        await acreate_table_artifact(deleted, key="swept-slices", description="Slices that nobody needed")
    return [entry["slice"] for entry in deleted]
