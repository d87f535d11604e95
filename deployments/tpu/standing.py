"""For people: where the slice of a run that waits for it stands.

The message of a state cannot be changed, and a state a minute would fill the run's history, as lines would its log. So the message has
what stays true, and an artifact of the run, of which there is one and which is written anew, has what changes.
"""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from deployments.tpu.cloud import CloudSlice

KEY = "tpu-slice"
REFRESH_SECONDS = 60.0


class Standing:
    """The artifacts `tpu-slice` of runs that wait."""

    def __init__(self) -> None:
        self._shown: dict[UUID, tuple[str, str, float]] = {}  # by run: slice, state, and when it was written
        self._artifacts: dict[UUID, UUID] = {}

    async def show(self, client: PrefectClient, run: FlowRun, each: CloudSlice) -> None:
        """Writes down where a slice stands: at once where its state is new, about each minute while its run waits."""
        waits = run.state is not None and run.state.is_pending()
        before = self._shown.get(run.id)
        if before is None and not waits:
            return
        due = before is None or before[:2] != (each.name, each.state) or (waits and time.monotonic() - before[2] >= REFRESH_SECONDS)
        if not due:
            return
        now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        text = f"{where_it_stands(each)}\n\nThat was {_minutes(each)} ago, as of {now}."
        artifact = self._artifacts.get(run.id) or await self._written_before(client, run.id)
        if artifact is None:
            wanted = ArtifactCreate(key=KEY, type="markdown", description=f"The slice of {run.name}", data=text, flow_run_id=run.id)
            artifact = (await client.create_artifact(wanted)).id
        else:
            await client.update_artifact(artifact, ArtifactUpdate(data=text))
        self._artifacts[run.id] = artifact
        self._shown[run.id] = (each.name, each.state, time.monotonic())

    def keep_only(self, runs: set[UUID]) -> None:
        """Forgets all other runs; their artifacts stay."""
        self._shown = {run: shown for run, shown in self._shown.items() if run in runs}
        self._artifacts = {run: artifact for run, artifact in self._artifacts.items() if run in runs}

    async def _written_before(self, client: PrefectClient, run: UUID) -> UUID | None:
        """By another worker, or this one before it was started again."""
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[KEY]), flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
        return next((found.id for found in await client.read_artifacts(artifact_filter=wanted)), None)


def where_it_stands(each: CloudSlice) -> str:
    """Slice, place, since when, and where to look in Google's console: nothing that changes while the slice is in that state."""
    _, project, _, zone, _, name = each.name.split("/")
    link = "" if project == "local" else f"; https://console.cloud.google.com/compute/tpus/queued-resources?project={project}"
    return f"{name} in {zone} is {each.state}, asked for at {each.created:%Y-%m-%d %H:%M} UTC{link}"


def _minutes(each: CloudSlice) -> str:
    minutes = round((datetime.datetime.now(datetime.UTC) - each.created).total_seconds() / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} minutes"
