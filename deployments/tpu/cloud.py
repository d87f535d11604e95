"""Cloud TPU through Google's own client: ask for a slice, see what became of it, delete it.

The client is imported when it is first needed: every Prefect process that loads collections imports this package.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.host_agent import NAMESPACE, TERMINATED

if TYPE_CHECKING:
    from google.cloud import tpu_v2

T = TypeVar("T")
CREATE_SECONDS = 60.0  # for the answer to a request for slices
CALL_SECONDS = 20.0  # for every other answer
FIRST_PAUSE_SECONDS = 1.0
# For what may pass: quota of requests per minute, an overloaded service. Whoever looks comes again by itself, and has more to look at.
CREATE_PATIENCE_SECONDS = 600.0
PATIENCE_SECONDS = 25.0
LOST = {"PREEMPTED", "TERMINATED", "STOPPED", "HIDDEN"}  # states of a node that does not come back


class Refused(ValueError):
    """Cloud TPU will not do this however often it is asked; the message says what to change."""


class Unavailable(RuntimeError):
    """Cloud TPU was asked again and again, and did not do it; later it may."""


class Exhausted(Unavailable):
    """The same, for a quota: of requests, or of chips."""


@dataclass(frozen=True)
class CloudSlice:
    """A queued resource as it is."""

    name: str  # projects/P/locations/Z/queuedResources/N
    state: str
    labels: dict[str, str]
    created: datetime.datetime
    message: str = ""
    nodes: tuple[str, ...] = ()
    active_since: datetime.datetime | None = None  # of the first node: from then on it is paid for
    lost_nodes: tuple[str, ...] = ()
    exit_codes: dict[int, int | None] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class CloudTpu:
    """One endpoint of the API: Google's, or an emulator on loopback (`address` host:port, without encryption).

    Every method raises Refused and Unavailable, and GoogleAPICallError for whatever else the API answers. Making one raises Refused.
    """

    def __init__(self, address: str | None = None) -> None:
        from google.cloud import tpu_v2

        if address is None:
            self._client = _with_credentials(tpu_v2.TpuAsyncClient)
        else:
            import grpc
            from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcAsyncIOTransport

            self._client = tpu_v2.TpuAsyncClient(transport=TpuGrpcAsyncIOTransport(channel=grpc.aio.insecure_channel(address)))

    async def create(
        self, configuration: TPUJobConfiguration, zone: str, name: str, labels: dict[str, str], metadata: dict[str, str]
    ) -> str:
        """Asks for the slices as one queued resource; returns its full name. Asking again for the same name adopts what is there.

        Raises:
            Refused: it is not allowed, or not known.
            Exhausted: it is beyond a quota.
        """
        from google.api_core import exceptions

        parent = configuration.parent(zone)
        request = {
            "parent": parent,
            "queued_resource_id": name,
            "queued_resource": queued_resource(configuration, parent, name, labels, metadata),
        }
        with suppress(exceptions.AlreadyExists):  # an earlier call came through and its answer did not
            await self._call(
                lambda: self._client.create_queued_resource(request, timeout=CREATE_SECONDS), parent, patience=CREATE_PATIENCE_SECONDS
            )
        return f"{parent}/queuedResources/{name}"

    async def slices(self, parent: str, wanted: Callable[[dict[str, str]], bool]) -> list[CloudSlice]:
        """Every queued resource of `parent` whose labels are wanted, without what its hosts report."""

        async def listed() -> list[tpu_v2.QueuedResource]:
            return [found async for found in await self._client.list_queued_resources({"parent": parent}, timeout=CALL_SECONDS)]

        found = [_as_slice(resource) for resource in await self._call(listed, parent)]
        return [each for each in found if wanted(each.labels)]

    async def accelerator_types(self, parent: str) -> set[str]:
        """The slices that the zone `parent` offers, by the names that requests use. Raises Refused."""

        async def listed() -> set[str]:
            return {found.type_ async for found in await self._client.list_accelerator_types({"parent": parent}, timeout=CALL_SECONDS)}

        return await self._call(listed, parent)

    async def with_hosts(self, seen: CloudSlice) -> CloudSlice:
        """An active slice with what its hosts report and which of its nodes are gone."""
        from google.api_core import exceptions

        codes: dict[int, int | None] = {}
        errors: dict[int, str] = {}
        lost: list[str] = []
        since: list[datetime.datetime] = []
        for name in seen.nodes:
            try:
                node = await self._call(lambda name=name: self._client.get_node({"name": name}, timeout=CALL_SECONDS), name)
            except exceptions.NotFound:
                lost.append(name.rpartition("/")[2])
                continue
            if node.create_time:
                since.append(_moment(node.create_time))
            if node.state.name in LOST:
                lost.append(name.rpartition("/")[2])
                continue
            for said in await self._reported(name):
                if said.get("process", "").isdecimal() and said.get("exit_code"):
                    rank, code = int(said["process"]), said["exit_code"]
                    codes[rank] = None if code == TERMINATED else int(code)
                    errors |= {rank: said["error"]} if said.get("error") else {}
        return replace(seen, active_since=min(since, default=None), lost_nodes=tuple(lost), exit_codes=codes, errors=errors)

    async def _reported(self, node: str) -> list[dict[str, str]]:
        """What the hosts of a node wrote for the worker, host by host; nothing, which is no sign of trouble, before the first word."""
        from google.api_core import exceptions

        request = {"name": node, "query_path": f"{NAMESPACE}/"}
        try:
            answer = await self._call(lambda: self._client.get_guest_attributes(request, timeout=CALL_SECONDS), node)
        except exceptions.NotFound:  # the answer where a namespace has no attribute yet
            return []
        return [{item.key: item.value for item in host.query_value.items} for host in answer.guest_attributes]

    async def delete(self, name: str) -> None:
        """Deletes a slice with its hosts, which get a SIGTERM first. One that is gone already is no error."""
        from google.api_core import exceptions

        with suppress(exceptions.NotFound):
            await self._call(lambda: self._client.delete_queued_resource({"name": name, "force": True}, timeout=CALL_SECONDS), name)

    async def exists(self, name: str) -> bool:
        """Whether the queued resource is still there, if only to be deleted."""
        from google.api_core import exceptions

        try:
            await self._call(lambda: self._client.get_queued_resource({"name": name}, timeout=CALL_SECONDS), name)
        except exceptions.NotFound:
            return False
        return True

    async def _call(self, call: Callable[[], Awaitable[T]], what: str, *, patience: float | None = None) -> T:
        """Calls, again and again with growing pauses where the error may pass, for `patience` seconds, or PATIENCE_SECONDS."""
        from google.api_core import exceptions
        from google.api_core.retry import AsyncRetry, if_exception_type
        from google.auth.exceptions import GoogleAuthError

        # Quota per minute is ResourceExhausted, as is quota of chips: the second stays, and is told after all of the patience.
        passing = if_exception_type(
            exceptions.ServiceUnavailable,
            exceptions.DeadlineExceeded,
            exceptions.InternalServerError,
            exceptions.TooManyRequests,
            exceptions.Aborted,
            exceptions.BadGateway,
            ConnectionError,
        )
        seconds = PATIENCE_SECONDS if patience is None else patience
        try:
            return await AsyncRetry(predicate=passing, initial=FIRST_PAUSE_SECONDS, maximum=30.0, timeout=seconds)(call)()  # pyright: ignore[reportCallIssue]
        except exceptions.RetryError as error:
            told = getattr(error.cause, "message", None) or error.cause
            if isinstance(error.cause, exceptions.TooManyRequests):
                raise Exhausted(f"Cloud TPU refused for {seconds:.0f} s for a quota at {what} ({told})") from None
            raise Unavailable(f"Cloud TPU did not do for {seconds:.0f} s what it was asked at {what} ({told})") from None
        except exceptions.Forbidden as error:
            raise Refused(
                f"Cloud TPU refuses this account at {what} ({error.message}): give it the role roles/tpu.admin in that project, and "
                "roles/iam.serviceAccountUser on the slice's service account"
            ) from None
        except (exceptions.Unauthorized, GoogleAuthError) as error:
            raise _no_credentials(getattr(error, "message", None) or error) from None
        except exceptions.InvalidArgument as error:
            raise Refused(f"Cloud TPU refuses the request at {what}: {error.message}") from None


def _with_credentials(make: Callable[[], T]) -> T:
    from google.auth.exceptions import GoogleAuthError

    try:
        return make()
    except GoogleAuthError as error:
        raise _no_credentials(error) from None


def _no_credentials(error: object) -> Refused:
    return Refused(f"Cloud TPU knows no credentials here ({error}): run `gcloud auth application-default login`")


def queued_resource(
    configuration: TPUJobConfiguration, parent: str, name: str, labels: dict[str, str], metadata: dict[str, str]
) -> dict[str, Any]:
    """The request as Cloud TPU takes it: one node, or a node for each slice, from spot capacity, on demand, or a reservation."""
    node: dict[str, Any] = {
        "accelerator_type": configuration.accelerator_type,
        "runtime_version": configuration.runtime,
        "labels": labels,
        "metadata": metadata,
        "network_config": {
            "network": configuration.network or "",
            "subnetwork": configuration.subnetwork or "",
            "enable_external_ips": configuration.external_ips,
        },
    }
    if configuration.service_account:
        node["service_account"] = {"email": configuration.service_account, "scope": ["https://www.googleapis.com/auth/cloud-platform"]}
    spec: dict[str, Any] = {"parent": parent, "node": node}
    if configuration.num_slices > 1:
        spec["multislice_params"] = {"node_count": configuration.num_slices, "node_id_prefix": name}
    else:
        spec["node_id"] = name
    resource: dict[str, Any] = {
        "tpu": {"node_spec": [spec]},
        "queueing_policy": {"valid_until_duration": datetime.timedelta(hours=configuration.valid_until)},
    }
    if configuration.provisioning == "spot":
        resource["spot"] = {}
    elif configuration.provisioning == "reserved":
        resource["guaranteed"] = {}
        resource["reservation_name"] = f"{parent}/reservations/{configuration.reservation}"
    return resource


def _as_slice(resource: tpu_v2.QueuedResource) -> CloudSlice:
    specs = resource.tpu.node_spec
    nodes: list[str] = []
    for spec in specs:
        count = spec.multislice_params.node_count
        names = [f"{spec.multislice_params.node_id_prefix}-{index}" for index in range(count)] if count else [spec.node_id]
        nodes += [f"{spec.parent}/nodes/{name}" for name in names]
    failed = resource.state.failed_data.error if resource.state.state.name == "FAILED" else None
    return CloudSlice(
        name=resource.name,
        state=resource.state.state.name,
        labels=dict(specs[0].node.labels) if specs else {},
        created=_moment(resource.create_time) if resource.create_time else datetime.datetime.now(datetime.UTC),
        message=failed.message if failed else "",
        nodes=tuple(nodes),
    )


def _moment(stamp: Any) -> datetime.datetime:
    """A time of the API, which is a datetime to proto-plus and a Timestamp to its annotations."""
    return stamp if isinstance(stamp, datetime.datetime) else stamp.ToDatetime(datetime.UTC)
