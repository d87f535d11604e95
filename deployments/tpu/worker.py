"""The `tpu` worker: one flow run is one queued resource of Cloud TPU.

`run` asks for the slice and returns; a loop that looks at slices and flow runs does everything after that, so that a worker that is
started again needs no memory of what it started.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
from prefect.settings import PREFECT_HOME
from prefect.workers.base import BaseWorker, BaseWorkerResult

from deployments.tpu.decide import Change
from deployments.tpu.form import SliceFields, TPUJobConfiguration, TPUVariables
from deployments.tpu.request import COORDINATOR_PORT, RUN_LABEL, SliceName, labels, log_directory, metadata

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from deployments.tpu.cloud import CloudSlice, CloudTpu

API_ADDRESS = "PREFECT_LLAMA_TPU_API"  # host:port of another Cloud TPU API than Google's, without encryption
GONE_SECONDS = 300.0  # for an older slice of the same run to be gone before a new one may train beside it
HARMLESS = {"SUSPENDED", "FAILED"}  # states in which a slice has no hosts


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

    async def setup(self) -> None:
        """Starts to look after slices beside looking for flow runs."""
        from deployments.tpu.reconcile import Reconciler

        await super().setup()
        assert self._runs_task_group is not None
        self._runs_task_group.start_soon(Reconciler(self).run_forever)

    async def run(
        self, flow_run: FlowRun, configuration: TPUJobConfiguration, task_status: anyio.abc.TaskStatus[Any] | None = None
    ) -> TPUWorkerResult:
        """Asks for the flow run's slice; returns when Cloud TPU has taken the request."""
        name = await self.launch(flow_run, configuration)
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

    async def _propose_crashed_state(self, flow_run: FlowRun, message: str, client: PrefectClient | None = None) -> None:
        """A run that no slice could be asked for: by a name that says that nobody tries it again, so that nobody waits for that."""
        from prefect.exceptions import Abort, ObjectNotFound
        from prefect.states import Crashed
        from prefect.utilities.engine import propose_state

        try:
            await propose_state(client or self.client, Crashed(name=Change.GAVE_UP.value, message=message), flow_run_id=flow_run.id)
        except (Abort, ObjectNotFound) as refused:
            self._logger.info("the run %s does not become %s: %s", flow_run.name, Change.GAVE_UP.value, refused)

    async def launch(self, flow_run: FlowRun, configuration: TPUJobConfiguration) -> str:
        """Asks for the next slice of a flow run, when no older one can still write; returns its full name."""
        states = await self.client.read_flow_run_states(flow_run.id)
        tried = sum(state.name == Change.NEXT_ZONE.value for state in states)
        zone = configuration.places[min(tried, len(configuration.places) - 1)]
        cloud = await self.cloud(configuration.parent(zone))
        older = await self._older_slices(flow_run, configuration)
        before = SliceName.parse(flow_run.infrastructure_pid or "")
        attempt = 1 + max([name.attempt for name in (before, *map(_name_of, older)) if name is not None], default=0)
        await self._wait_until_gone(older)
        slice_name = SliceName(flow_run.id, attempt)
        name, logs = str(slice_name), log_directory(configuration, flow_run.parameters, slice_name)
        port = _free_port() if configuration.provider == "local" else COORDINATOR_PORT
        made = await cloud.create(
            configuration,
            zone,
            name,
            labels(configuration, flow_run.id, self.work_pool.name),
            metadata(configuration, dict(flow_run.parameters), sys.executable, port, logs),
        )
        self.get_flow_run_logger(flow_run).info(
            "asked for %d x %s (%s) in %s as %s",
            configuration.num_slices,
            configuration.accelerator_type,
            configuration.provisioning,
            zone,
            name,
        )
        self.get_flow_run_logger(flow_run).info("its hosts log to %s", where_hosts_log(configuration, name, logs))
        return made

    async def _older_slices(self, flow_run: FlowRun, configuration: TPUJobConfiguration) -> list[CloudSlice]:
        found: list[CloudSlice] = []
        for place in configuration.places:
            parent = configuration.parent(place)
            cloud = await self.cloud(parent)
            found += await cloud.slices(parent, lambda labels: labels.get(RUN_LABEL) == str(flow_run.id))
        return found

    async def _wait_until_gone(self, older: list[CloudSlice]) -> None:
        """Two slices that train the same run at once would write the same checkpoints."""
        for each in older:
            cloud = await self.cloud(each.name)
            await cloud.delete(each.name)
            if each.state in HARMLESS:
                continue
            with anyio.fail_after(GONE_SECONDS):
                while await cloud.exists(each.name):
                    await anyio.sleep(1.0)

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


def _name_of(each: CloudSlice) -> SliceName | None:
    return SliceName.parse(each.name)


def _free_port() -> int:
    """Simulated hosts share one address, so every slice needs a port of its own."""
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])
