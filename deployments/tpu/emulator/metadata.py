"""The metadata server of one simulated host, as Compute Engine has it at metadata.google.internal.

Source: cloud.google.com/compute/docs/metadata (paths, the header that is required, guest attributes, tokens).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_FLAVOR = "Metadata-Flavor"
_ROOT = "/computeMetadata/v1/"
_ATTRIBUTES = "instance/attributes/"
_GUEST = "instance/guest-attributes/"
_ACCOUNT = "instance/service-accounts/default/"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class MetadataServer:
    """HTTP on a free port of 127.0.0.1. Guest attributes are kept as long as it lives, over reboots of the host.

    attributes: the host's attributes, asked anew for each request.
    """

    def __init__(self, attributes: Callable[[], dict[str, str]], *, project: str, zone: str) -> None:
        self._attributes = attributes
        self._project, self._zone = project, zone
        self._guest: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"metadata": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def guest_attributes(self) -> dict[tuple[str, str], str]:
        """(namespace, key) -> value, as the host has set them so far."""
        with self._lock:
            return dict(self._guest)

    def close(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()

    def read(self, path: str) -> tuple[int, str]:
        """HTTP status and body of a GET of `path`, which is below /computeMetadata/v1/."""
        if path.startswith(_ATTRIBUTES):
            return _found(self._attributes().get(path.removeprefix(_ATTRIBUTES)))
        if path.startswith(_GUEST):
            if not self._guest_attributes_enabled():
                return 403, "guest attributes are not enabled: set the metadata enable-guest-attributes to TRUE"
            namespace, _, key = path.removeprefix(_GUEST).partition("/")
            return _found(self.guest_attributes.get((namespace, key)))
        account = {"aliases": ["default"], "email": "default", "scopes": [_SCOPE]}
        return _found(
            {
                "project/project-id": self._project,
                "instance/zone": f"projects/{self._project}/zones/{self._zone}",
                f"{_ACCOUNT}token": json.dumps({"access_token": "emulated", "expires_in": 3600, "token_type": "Bearer"}),
                _ACCOUNT: json.dumps(account),
            }.get(path)
        )

    def write(self, path: str, value: str) -> tuple[int, str]:
        """HTTP status and body of a PUT of `path`: a guest attribute, as instance/guest-attributes/NAMESPACE/KEY."""
        namespace, _, key = path.removeprefix(_GUEST).partition("/")
        if not path.startswith(_GUEST) or not namespace or not key or "/" in key:
            return 404, "only instance/guest-attributes/NAMESPACE/KEY can be written"
        if not self._guest_attributes_enabled():
            return 403, "guest attributes are not enabled: set the metadata enable-guest-attributes to TRUE"
        with self._lock:
            self._guest[namespace, key] = value
        return 200, ""

    def _guest_attributes_enabled(self) -> bool:
        return self._attributes().get("enable-guest-attributes", "").upper() == "TRUE"


def _found(value: str | None) -> tuple[int, str]:
    return (404, "not found") if value is None else (200, value)


class _Handler(BaseHTTPRequestHandler):
    metadata: MetadataServer

    def do_GET(self) -> None:
        path = self._path()
        if path is not None:
            self._answer(*self.metadata.read(path))

    def do_PUT(self) -> None:
        value = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = self._path()
        if path is not None:
            self._answer(*self.metadata.write(path, value))

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _path(self) -> str | None:
        """What is asked for, below the root; None if the request was answered with a refusal."""
        path = unquote(urlsplit(self.path).path)
        if self.headers.get(_FLAVOR) != "Google":
            self._answer(403, f"missing {_FLAVOR}: Google header")
        elif path == "/":  # how Google's libraries see whether there is a metadata server
            self._answer(200, "computeMetadata/\n")
        elif not path.startswith(_ROOT):
            self._answer(404, "not found")
        else:
            return path.removeprefix(_ROOT)
        return None

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header(_FLAVOR, "Google")
        self.send_header("Content-Type", "application/json" if text.startswith("{") else "application/text")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
