"""What a host of a slice says: to its own output, and into one object of the run's bucket. Part of the startup script, as `host_agent`."""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import IO

PIECE_SECONDS = 30.0  # between two pieces of the log in the bucket
PENDING_BYTES = 8 << 20  # that wait for the bucket; what comes on top of them is in this host's own output only
TRIES = 5
HIDDEN = b"[hidden]"
SHORTEST_SECRET = 8  # what is shorter is no secret, and its letters stand in other words


class BucketLog:
    """One object of a bucket that grows. A piece is for the generation that was seen: none is added twice when an answer gets lost."""

    def __init__(self, token: Callable[[], str], url: str) -> None:
        self.url = url
        self._token = token
        bucket, _, self._name = url.removeprefix("gs://").partition("/")
        root = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
        self._objects, self._uploads = f"{root}/storage/v1/b/{bucket}/o", f"{root}/upload/storage/v1/b/{bucket}/o"
        self._size: int | None = None  # with all pieces that this boot knows to be there

    def append(self, piece: bytes) -> int:
        """Adds `piece`, or finds that an earlier call has added the start of it; returns how many of its bytes are there now.

        Raises:
            OSError: the bucket cannot be reached, or refuses.
        """
        size, generation = self._stat()
        before = size if self._size is None else min(self._size, size)
        self._size = size
        if size > before:
            return min(size - before, len(piece))
        target = self._name if generation == "0" else f"{self._name}.piece"
        matching = "&ifGenerationMatch=0" if generation == "0" else ""
        self._call("POST", f"{self._uploads}?uploadType=media&name={_quoted(target)}{matching}", piece, "text/plain; charset=utf-8")
        if generation != "0":
            parts = {"sourceObjects": [{"name": self._name}, {"name": target}], "destination": {"contentType": "text/plain; charset=utf-8"}}
            url = f"{self._objects}/{_quoted(self._name)}/compose?ifGenerationMatch={generation}"
            self._call("POST", url, json.dumps(parts).encode(), "application/json")
        self._size += len(piece)
        return len(piece)

    def end(self) -> None:
        """Deletes the last piece, which is in the log as well."""
        with suppress(OSError):
            self._call("DELETE", f"{self._objects}/{_quoted(self._name)}.piece")

    def _stat(self) -> tuple[int, str]:
        try:
            found = json.loads(self._call("GET", f"{self._objects}/{_quoted(self._name)}?fields=size,generation"))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return 0, "0"
            raise
        return int(found["size"]), str(found["generation"])

    def _call(self, method: str, url: str, body: bytes | None = None, kind: str = "") -> bytes:
        headers = {"Authorization": f"Bearer {self._token()}", **({"Content-Type": kind} if kind else {})}
        request = urllib.request.Request(url, headers=headers, method=method, data=body)
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return answer.read()
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"{type(error).__name__}: {error}") from None


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


class HostLog:
    """What this host says: to its own output, and in pieces to the run's bucket, without the values of secrets."""

    def __init__(self) -> None:
        self.bucket: BucketLog | None = None
        self._secrets: list[bytes] = []
        self._pending = bytearray()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._told = False

    def hide(self, values: list[str]) -> None:
        """Leaves these values out from now on."""
        lines = {line.strip() for value in values for line in value.splitlines()}  # what is said comes by lines
        self._secrets = sorted((line.encode() for line in lines if len(line) >= SHORTEST_SECRET), key=len, reverse=True)

    def say(self, text: str) -> None:
        """Adds a line of this script's own."""
        self._write(text.encode() + b"\n")

    def follow(self, output: IO[bytes]) -> None:
        """Adds what a command says, as it comes. Threads begin here, after the command: it was forked from a process with one thread."""
        self._threads = [threading.Thread(target=each, daemon=True) for each in (lambda: self._read(output), self._send_often)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Brings what is left to the bucket."""
        self._ended.set()
        for thread in self._threads:
            thread.join(20.0)  # a process that outlives the command may keep its output open
        if self.bucket is None:
            return
        for _ in range(TRIES):
            self._send()
            if not self._pending:
                break
            time.sleep(1)
        self.bucket.end()

    def _read(self, output: IO[bytes]) -> None:
        for line in iter(lambda: output.readline(1 << 16), b""):
            self._write(line)

    def _write(self, line: bytes) -> None:
        for secret in self._secrets:
            line = line.replace(secret, HIDDEN)
        with self._lock:
            with suppress(OSError):  # nobody reads it, and the command must be able to go on
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            if len(self._pending) + len(line) <= PENDING_BYTES:
                self._pending += line

    def _send_often(self) -> None:
        while not self._ended.wait(PIECE_SECONDS):
            self._send()

    def _send(self) -> None:
        with self._lock:
            piece = bytes(self._pending)
        if self.bucket is None or not piece:
            return
        try:
            done = self.bucket.append(piece)
        except OSError as error:
            if not self._told:
                self._told = True
                self.say(f"cannot write {self.bucket.url} ({error}): the log goes on here; give the slice's service account the bucket")
            return
        with self._lock:
            del self._pending[:done]
