"""The `tpu` worker: one flow run is one queued resource of Cloud TPU.

`run` asks for the slice and returns; a loop that looks at slices and flow runs does everything after that, so that a worker that is
started again needs no memory of what it started.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
from prefect.settings import PREFECT_HOME
from prefect.workers.base import BaseWorker, BaseWorkerResult

from deployments.tpu.decide import Change
from deployments.tpu.form import SliceFields, TPUJobConfiguration, TPUVariables
from deployments.tpu.launch import Postponed, launch

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from deployments.tpu.cloud import CloudTpu

API_ADDRESS = "PREFECT_LLAMA_TPU_API"  # host:port of another Cloud TPU API than Google's, without encryption


class TPUWorkerResult(BaseWorkerResult):
    """The name of the slice; what becomes of it is seen by the loop."""


class TPUWorker(BaseWorker[TPUJobConfiguration, TPUVariables, TPUWorkerResult]):
    """Runs every flow run on TPU slices of its own."""

    type = "tpu"
    job_configuration = TPUJobConfiguration
    job_configuration_variables = TPUVariables
    _display_name = "Cloud TPU"
    _description = "Runs each flow run on its own Cloud TPU slice, or on a slice simulated on this machine."
    _logo_url = "https://cloud.google.com/_static/cloud/images/social-icon-google-cloud-1200-630.png"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._clouds: dict[str, CloudTpu] = {}
        self.places: set[str] = set()  # `projects/P/locations/Z`: where slices of the pool may be; it grows

    async def setup(self) -> None:
        """Starts to look after slices beside looking for flow runs."""
        from deployments.tpu.reconcile import Reconciler

        await super().setup()
        assert self._runs_task_group is not None
        self._runs_task_group.start_soon(Reconciler(self).run_forever)

    async def run(
        self, flow_run: FlowRun, configuration: TPUJobConfiguration, task_status: anyio.abc.TaskStatus[Any] | None = None
    ) -> TPUWorkerResult:
        """Asks for the flow run's slice; returns when Cloud TPU has taken the request, or when the run is to wait."""
        try:
            name = await launch(self, flow_run, configuration)
        except Postponed as postponed:
            await self._postpone(flow_run, postponed)
            if task_status is not None:
                task_status.started(postponed)  # to Prefect: nothing was started
            return TPUWorkerResult(identifier="", status_code=0)
        if task_status is not None:
            task_status.started(name)  # Prefect keeps it as the run's infrastructure_pid
        return TPUWorkerResult(identifier=name, status_code=0)

    async def kill_infrastructure(self, infrastructure_pid: str, configuration: TPUJobConfiguration, grace_seconds: int = 30) -> None:
        """Deletes the slice; its hosts get a SIGTERM first.

        Raises:
            InfrastructureNotFound: it is gone already.
        """
        from prefect.exceptions import InfrastructureNotFound

        cloud = await self.cloud(infrastructure_pid)
        if not await cloud.exists(infrastructure_pid):
            raise InfrastructureNotFound(f"the slice {infrastructure_pid} is gone")
        await cloud.delete(infrastructure_pid)

    async def _postpone(self, flow_run: FlowRun, postponed: Postponed) -> None:
        """Schedules a run again that is still wanted."""
        from prefect.exceptions import Abort, ObjectNotFound
        from prefect.states import Scheduled
        from prefect.utilities.engine import propose_state

        self.get_flow_run_logger(flow_run).warning("%s: %s", postponed.name, postponed)
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=postponed.seconds)
        try:
            now = (await self.client.read_flow_run(flow_run.id)).state
            if now is None or now.is_pending():  # a run that was cancelled meanwhile stays so
                await propose_state(
                    self.client, Scheduled(name=postponed.name, message=str(postponed), scheduled_time=at), flow_run_id=flow_run.id
                )
        except (Abort, ObjectNotFound) as refused:
            self._logger.info("the run %s does not become %s: %s", flow_run.name, postponed.name, refused)

    async def _propose_crashed_state(self, flow_run: FlowRun, message: str, client: PrefectClient | None = None) -> None:
        """A run that no slice could be asked for: by a name that says that nobody tries it again, so that nobody waits for that."""
        from prefect.exceptions import Abort, ObjectNotFound
        from prefect.states import Crashed
        from prefect.utilities.engine import propose_state

        try:
            await propose_state(client or self.client, Crashed(name=Change.GAVE_UP.value, message=message), flow_run_id=flow_run.id)
        except (Abort, ObjectNotFound) as refused:
            self._logger.info("the run %s does not become %s: %s", flow_run.name, Change.GAVE_UP.value, refused)

    async def cloud(self, name: str) -> CloudTpu:
        """The API that keeps what is called `name` (`projects/P/…`): Google's, or the emulator of this machine."""
        from deployments.tpu.cloud import CloudTpu
        from deployments.tpu.emulator.address import running_emulator

        if is_local(name):
            address = await anyio.to_thread.run_sync(running_emulator, emulator_directory())
        else:
            address = os.environ.get(API_ADDRESS)
        key = address or ""
        if key not in self._clouds:
            self._clouds[key] = CloudTpu(address)
        return self._clouds[key]


def is_local(name: str) -> bool:
    """Whether `name` is of the provider `local`."""
    return name.startswith(f"{SliceFields().parent('')}")


def emulator_directory() -> Path:
    """Where the simulated slices of this machine keep their logs."""
    return PREFECT_HOME.value() / "tpu-emulator"


def where_hosts_log(configuration: TPUJobConfiguration, name: str, logs: str | None) -> str:
    """For people: the place of a slice's logs, one for each host, and in a bucket its page in Google's console.

    logs: the `log_directory`.
    """
    if configuration.provider == "local":
        return f"{emulator_directory()}/{name}*.log"
    if logs is None:
        return "the system log of each host, which goes with it: with --root in a bucket they are kept there"
    return f"{logs}/host-N.log, https://console.cloud.google.com/storage/browser/{logs.removeprefix('gs://')}"
