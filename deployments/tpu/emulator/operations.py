"""Long-running operations, as google.longrunning has them."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable

from google.cloud import tpu_v2
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from deployments.tpu.emulator.refusal import not_found

_KEPT = 1000  # operations; older ones are forgotten


class Operations:
    """Operations by name. Any thread may call it."""

    def __init__(self) -> None:
        self._operations: OrderedDict[str, operations_pb2.Operation] = OrderedDict()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def get(self, name: str) -> operations_pb2.Operation:
        """The operation as it is now.

        Raises:
            Refusal: NOT_FOUND.
        """
        with self._lock:
            if name not in self._operations:
                raise not_found(name)
            return _copy(self._operations[name])

    def done(self, verb: str, target: str, result: tpu_v2.QueuedResource) -> operations_pb2.Operation:
        """An operation that has ended with that result."""
        operation = self._new(verb, target)
        operation.done = True
        operation.response.Pack(tpu_v2.QueuedResource.pb(result))
        return self._keep(operation)

    def start(self, verb: str, target: str, work: Callable[[], None]) -> operations_pb2.Operation:
        """An operation that ends, without a result, when `work` returns, which it does on a thread of its own."""
        operation = self._new(verb, target)
        shown = self._keep(operation)

        def run() -> None:
            try:
                work()
            except RuntimeError as error:
                with self._lock:
                    operation.error.code, operation.error.message = 13, str(error)  # google.rpc.Code.INTERNAL
                    operation.done = True
                return
            with self._lock:
                operation.response.Pack(empty_pb2.Empty())
                operation.done = True

        threading.Thread(target=run, daemon=True).start()
        return shown

    def _new(self, verb: str, target: str) -> operations_pb2.Operation:
        zone = "/".join(target.split("/")[:4])
        operation = operations_pb2.Operation(name=f"{zone}/operations/operation-{next(self._numbers)}")
        metadata = tpu_v2.OperationMetadata(target=target, verb=verb, api_version="v2")
        operation.metadata.Pack(tpu_v2.OperationMetadata.pb(metadata))
        return operation

    def _keep(self, operation: operations_pb2.Operation) -> operations_pb2.Operation:
        with self._lock:
            self._operations[operation.name] = operation
            while len(self._operations) > _KEPT:
                self._operations.popitem(last=False)
            return _copy(operation)


def _copy(operation: operations_pb2.Operation) -> operations_pb2.Operation:
    made = operations_pb2.Operation()
    made.CopyFrom(operation)
    return made
