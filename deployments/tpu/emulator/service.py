"""The Cloud TPU API v2 over gRPC, made of the client's own messages: google.cloud.tpu.v2.Tpu and google.longrunning.Operations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from google.cloud import tpu_v2
from google.longrunning import operations_pb2

from deployments.tpu.emulator.cloud import Cloud
from deployments.tpu.emulator.operations import Operations
from deployments.tpu.emulator.refusal import Refusal, invalid
from model.slices import SLICES

Around = Callable[[str, Any, Callable[[], Any]], Any]
_T = TypeVar("_T")
_THREADS = 16
_PAGE = 500  # resources, where the client does not say how many it wants


class Service:
    """Serves a cloud.

    around: called with a method's name, its request, and the call to make, in place of that call; it answers what the client gets. It
    may record, delay, raise a `Refusal` in place of the call, or raise one after the call, whose reply is then lost.
    """

    def __init__(self, cloud: Cloud, *, around: Around | None = None) -> None:
        self.cloud = cloud
        self._around = around
        self._operations = Operations()
        self._server = grpc.server(ThreadPoolExecutor(_THREADS), options=[("grpc.so_reuseport", 0)])
        self._last_call = time.monotonic()
        self._lock = threading.Lock()

    def is_idle(self, seconds: float) -> bool:
        """Whether there is no queued resource, and for so long no request came and `touch` was not called."""
        with self._lock:
            quiet = time.monotonic() - self._last_call
        return quiet >= seconds and not self.cloud.list("")

    def touch(self) -> None:
        """Somebody is interested: as if a request had come."""
        with self._lock:
            self._last_call = time.monotonic()

    def start(self, port: int = 0) -> str:
        """Listens on that port of 127.0.0.1, 0 for a free one. The address, host:port.

        Raises:
            RuntimeError: the port is taken.
        """
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("google.cloud.tpu.v2.Tpu", self._tpu_handlers()),
                grpc.method_handlers_generic_handler("google.longrunning.Operations", self._operation_handlers()),
            )
        )
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()
        return f"127.0.0.1:{bound}"

    def stop(self) -> None:
        """No more answers; hosts go on."""
        self._server.stop(grace=None).wait()

    def _tpu_handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        calls: dict[str, tuple[Any, Callable[[Any], Any], Any]] = {
            "CreateQueuedResource": (tpu_v2.CreateQueuedResourceRequest, self._create, None),
            "GetQueuedResource": (tpu_v2.GetQueuedResourceRequest, lambda request: self.cloud.get(request.name), tpu_v2.QueuedResource),
            "ListQueuedResources": (tpu_v2.ListQueuedResourcesRequest, self._list, tpu_v2.ListQueuedResourcesResponse),
            "DeleteQueuedResource": (tpu_v2.DeleteQueuedResourceRequest, self._delete, None),
            "GetNode": (tpu_v2.GetNodeRequest, lambda request: self.cloud.get_node(request.name), tpu_v2.Node),
            "ListNodes": (tpu_v2.ListNodesRequest, self._list_nodes, tpu_v2.ListNodesResponse),
            "DeleteNode": (tpu_v2.DeleteNodeRequest, self._delete_node, None),
            "ListAcceleratorTypes": (tpu_v2.ListAcceleratorTypesRequest, self._list_types, tpu_v2.ListAcceleratorTypesResponse),
            "GetGuestAttributes": (tpu_v2.GetGuestAttributesRequest, self._guest_attributes, tpu_v2.GetGuestAttributesResponse),
        }
        return {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, call),
                request_deserializer=request.deserialize,
                response_serializer=operations_pb2.Operation.SerializeToString if response is None else response.serialize,
            )
            for name, (request, call, response) in calls.items()
        }

    def _operation_handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        handler = grpc.unary_unary_rpc_method_handler(
            self._guarded("GetOperation", lambda request: self._operations.get(request.name)),
            request_deserializer=operations_pb2.GetOperationRequest.FromString,
            response_serializer=operations_pb2.Operation.SerializeToString,
        )
        return {"GetOperation": handler}

    def _guarded(self, name: str, call: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            self.touch()
            try:
                if self._around is None:
                    return call(request)
                return self._around(name, request, lambda: call(request))
            except Refusal as refusal:
                context.abort(refusal.code, refusal.message)

        return handle

    def _create(self, request: tpu_v2.CreateQueuedResourceRequest) -> operations_pb2.Operation:
        made = self.cloud.create(request)
        return self._operations.done("create", made.name, made)

    def _delete(self, request: tpu_v2.DeleteQueuedResourceRequest) -> operations_pb2.Operation:
        return self._operations.start("delete", request.name, self.cloud.delete(request.name, force=request.force))

    def _delete_node(self, request: tpu_v2.DeleteNodeRequest) -> operations_pb2.Operation:
        return self._operations.start("delete", request.name, self.cloud.delete_node(request.name))

    def _list(self, request: tpu_v2.ListQueuedResourcesRequest) -> tpu_v2.ListQueuedResourcesResponse:
        page, token = _page(self.cloud.list(request.parent), request.page_size, request.page_token)
        return tpu_v2.ListQueuedResourcesResponse(queued_resources=page, next_page_token=token)

    def _list_nodes(self, request: tpu_v2.ListNodesRequest) -> tpu_v2.ListNodesResponse:
        page, token = _page(self.cloud.list_nodes(request.parent), request.page_size, request.page_token)
        return tpu_v2.ListNodesResponse(nodes=page, next_page_token=token)

    def _list_types(self, request: tpu_v2.ListAcceleratorTypesRequest) -> tpu_v2.ListAcceleratorTypesResponse:
        types = [tpu_v2.AcceleratorType(name=f"{request.parent}/acceleratorTypes/{name}", type_=name) for name in SLICES]
        page, token = _page(types, request.page_size, request.page_token)
        return tpu_v2.ListAcceleratorTypesResponse(accelerator_types=page, next_page_token=token)

    def _guest_attributes(self, request: tpu_v2.GetGuestAttributesRequest) -> tpu_v2.GetGuestAttributesResponse:
        return tpu_v2.GetGuestAttributesResponse(guest_attributes=self.cloud.guest_attributes(request))


def _page(items: Sequence[_T], size: int, token: str) -> tuple[Sequence[_T], str]:
    """The items of one page, and the token of the next, "" for none."""
    if token and not token.isdigit():
        raise invalid("page_token", token, "give a next_page_token of an earlier answer")
    start = int(token or 0)
    end = start + (size if size > 0 else _PAGE)
    return items[start:end], str(end) if end < len(items) else ""
