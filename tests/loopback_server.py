"""A real HTTP server on the loopback interface, with faults on order, and a Hugging Face Hub that speaks what its client asks for."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Fault:
    """What one GET gets in place of the file: a status, or the file cut after so many bytes or sent in slow pieces."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    pause: float = 0.0


@dataclass
class Served:
    """A file on the server."""

    data: bytes
    etag: str | None
    modified: str | None = None
    ranges: bool = True
    head: bool = True
    length: bool = True


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]


class Loopback:
    """The server: files by path, faults that are used up one a GET, and the requests that came. `routes` come before files."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[Asked] = []
        self.sent: dict[str, int] = {}
        self.connections: set[socket.socket] = set()
        self.routes: Callable[[Any, str, dict[str, list[str]]], bool] = lambda handler, path, query: False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"loopback": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def put(self, path: str, data: bytes, *, etag: str | None = "", **options: Any) -> str:
        """Serves a file; its URL. By default its ETag is of its content."""
        tag = f'"{hashlib.md5(data).hexdigest()}"' if etag == "" else etag
        self.files[path] = Served(data, tag, **options)
        return f"{self.url}{path}"

    def gets(self, path: str | None = None) -> list[Asked]:
        return [asked for asked in self.requests if asked.method == "GET" and path in (None, asked.path)]

    def close(self) -> None:
        """Ends the server, and the connections that clients keep."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def loopback() -> Iterator[Loopback]:
    """A running server."""
    server = Loopback()
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loopback: Loopback

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            super().handle()

    def setup(self) -> None:
        super().setup()
        self.loopback.connections.add(self.connection)

    def finish(self) -> None:
        super().finish()
        self.loopback.connections.discard(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> bool:
        return self.body(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def body(self, data: bytes, status: int, headers: dict[str, str]) -> bool:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return True

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.loopback.requests.append(Asked(self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        if self.loopback.routes(self, path, parse_qs(url.query)):
            return
        self.send_file(path)

    def send_file(self, path: str) -> None:
        """The file, its range, or the fault that is due."""
        faults = self.loopback.faults.get(path, [])
        fault = faults.pop(0) if self.command == "GET" and faults else Fault()
        served = self.loopback.files.get(path)
        if fault.status is not None or served is None:
            self.body(b"no", fault.status or 404, fault.headers)
            return
        if self.command == "HEAD" and not served.head:
            self.body(b"", 403, {})
            return
        start, status = self._range(served)
        data = served.data[start:]
        self.send_response(status)
        headers = {"ETag": served.etag, "Last-Modified": served.modified, **fault.headers}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(served.data) - 1}/{len(served.data)}"
        headers["Content-Length" if served.length else "Connection"] = str(len(data)) if served.length else "close"
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send(path, data if fault.cut is None else data[: fault.cut], fault.pause)
        if fault.cut is not None or not served.length:
            self.close_connection = True

    def _range(self, served: Served) -> tuple[int, int]:
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if asked is None or not served.ranges or condition not in (None, served.etag, served.modified):
            return 0, 200
        return int(asked.removeprefix("bytes=").partition("-")[0]), 206

    def _send(self, path: str, data: bytes, pause: float) -> None:
        piece = len(data) if not pause else 1 << 16
        try:
            for start in range(0, len(data), max(piece, 1)):
                self.wfile.write(data[start : start + piece])
                self.loopback.sent[path] = self.loopback.sent.get(path, 0) + len(data[start : start + piece])
                time.sleep(pause)
        except OSError:
            self.close_connection = True


class Hub:
    """A hub with one dataset, `org/web`, and one model, `org/llama`, on a Loopback; large files are on another one, as on the real hub."""

    COMMIT = "a" * 40
    TOKEN = "hf_secret"

    def __init__(self, hub: Loopback, storage: Loopback) -> None:
        self.server, self.storage = hub, storage
        self.files: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.revisions = {"main": self.COMMIT, "v1": self.COMMIT, self.COMMIT: self.COMMIT}
        self.gated = False
        self.page = 2
        hub.routes = self._route

    def put(self, path: str, data: bytes, *, large: bool = False) -> None:
        self.files[path] = data
        if large:
            self.large.add(path)
            self.storage.put(f"/{hashlib.sha256(data).hexdigest()}", data)

    def asked(self, word: str) -> list[Asked]:
        return [asked for asked in self.server.requests if word in asked.path]

    def _entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
        entry["oid"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        if path in self.large:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _route(self, handler: Any, path: str, query: dict[str, list[str]]) -> bool:
        if self.gated and handler.headers.get("Authorization") != f"Bearer {self.TOKEN}":
            return handler.json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        for base in ("/api/datasets/org/web", "/api/models/org/llama"):
            if path == base or path.startswith(f"{base}/"):
                return self._api(handler, path.removeprefix(base).strip("/").split("/", 2), query)
        for base in ("/datasets/org/web/resolve/", "/org/llama/resolve/"):
            if path.startswith(base):
                return self._resolve(handler, *path.removeprefix(base).split("/", 1))
        return handler.json({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _api(self, handler: Any, parts: list[str], query: dict[str, list[str]]) -> bool:
        call, revision = parts[0], parts[1] if len(parts) > 1 else "main"
        if revision not in self.revisions:
            return handler.json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if call in ("", "revision"):
            return handler.json({"id": "org/web", "sha": self.revisions[revision], "siblings": []})
        if call == "paths-info":
            form = parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode())
            return handler.json([self._entry(path) for path in form["paths"] if path in self.files])
        below = f"{parts[2]}/" if len(parts) > 2 else ""
        deep = query.get("recursive", ["False"])[0].lower() == "true"
        paths = sorted(path for path in self.files if path.startswith(below) and (deep or "/" not in path[len(below) :]))
        if below and not paths:
            return handler.json({"error": "no such path"}, 404, {"X-Error-Code": "EntryNotFound"})
        start = int(query.get("cursor", ["0"])[0])
        there = f"{self.server.url}{urlsplit(handler.path).path}?recursive={deep}&cursor={start + self.page}"
        more = {"Link": f'<{there}>; rel="next"'} if start + self.page < len(paths) else {}
        return handler.json([self._entry(path) for path in paths[start : start + self.page]], 200, more)

    def _resolve(self, handler: Any, revision: str, path: str) -> bool:
        if revision not in self.revisions or path not in self.files:
            return handler.json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        if path in self.large:
            digest = hashlib.sha256(self.files[path]).hexdigest()
            return handler.body(b"", 302, {"Location": f"{self.storage.url}/{digest}?X-Amz-Signature=signed"})
        whole = f"{handler.path}"
        self.server.put(unquote(urlsplit(whole).path), self.files[path])
        handler.send_file(unquote(urlsplit(whole).path))
        return True
