"""What happens to simulated slices, by order of another process: HTTP on a port of its own, JSON in and out.

    order("127.0.0.1:40001", "preempt", name="projects/p/locations/z/queuedResources/q", grace=20)

Orders, with their fields: preempt and reboot (name, grace, node: one slice only, or left out), kill_host (node, worker), fail (name,
message), capacity (slices, zone). An order is answered when it is carried out. GET / tells the states of everything.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from deployments.tpu.emulator.cloud import Cloud
from deployments.tpu.emulator.refusal import Refusal

_TIMEOUT = 120.0  # seconds; a preemption's grace is part of it


class Control:
    """The port. about: what GET / tells beside the states, for example the process id; it is called for each request."""

    def __init__(self, cloud: Cloud, about: Callable[[], dict[str, Any]]) -> None:
        self._cloud, self._about = cloud, about
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"control": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()

    def tell(self) -> dict[str, Any]:
        """The states of queued resources and nodes, by name."""
        return {
            **self._about(),
            "queued_resources": {one.name: one.state.state.name for one in self._cloud.list("")},
            "nodes": {one.name: one.state.name for one in self._cloud.list_nodes("")},
        }

    def obey(self, verb: str, fields: dict[str, Any]) -> None:
        """Carries out one order.

        Raises:
            ValueError: there is no such order.
            TypeError: a field is missing or unknown.
            Refusal: the resource is not there, or its state does not allow it.
        """
        orders: dict[str, Callable[..., None]] = {
            "preempt": self._cloud.events.preempt,
            "reboot": self._cloud.events.reboot,
            "kill_host": self._cloud.events.kill_host,
            "fail": self._cloud.events.fail,
            "capacity": self._cloud.set_capacity,
        }
        if verb not in orders:
            raise ValueError(f"order={verb!r}: give one of {', '.join(orders)}")
        orders[verb](**fields)


def order(address: str, verb: str, **fields: Any) -> None:
    """Gives an order to the emulator whose control port that is; returns when it is carried out.

    Raises:
        ValueError: the emulator refused; it says why.
        OSError: no emulator answers there.
    """
    connection = HTTPConnection(address, timeout=_TIMEOUT)
    try:
        connection.request("POST", f"/{verb}", json.dumps(fields), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = json.loads(answer.read())
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(body["error"])


class _Handler(BaseHTTPRequestHandler):
    control: Control

    def do_GET(self) -> None:
        self._answer(200, self.control.tell())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.control.obey(self.path.strip("/"), json.loads(body or b"{}"))
        except Refusal as refusal:
            self._answer(404 if refusal.code is grpc.StatusCode.NOT_FOUND else 409, {"error": str(refusal)})
        except (ValueError, TypeError) as error:
            self._answer(400, {"error": str(error)})
        except (OSError, RuntimeError) as error:
            self._answer(500, {"error": str(error)})
        else:
            self._answer(200, {})

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
