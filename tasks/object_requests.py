"""Requests to Google Cloud Storage, through gcsfs: sent again where that can help, and errors that say what to do.

A request is sent again after 408, 429, 5xx, a lost connection and silence, with jittered waits, and never after 400, 401,
403, 404 or 412. gcsfs itself waits a second at least, sends a 401 again, and waits for an answer for ever, so only its
session, credentials and addresses are used.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.places import ObjectPath
from tasks.sources.request_limits import RetryRule, is_retried
from tasks.storage import StorageError

RULE = RetryRule(attempts=10, first_seconds=0.5, longest_seconds=32.0)
ROLE = "roles/storage.objectUser"
EMULATOR = "STORAGE_EMULATOR_HOST"
CREDENTIALS = "PREFECT_LLAMA_GCP_CREDENTIALS"  # name of a block of Prefect's type GCP Credentials, instead of the machine's own
# To connect, and to hear something; a whole request may take a second longer for each MiB.
_CONNECT_SECONDS, _SILENT_SECONDS, _LEAST_SECONDS = 20.0, 60.0, 120.0

_logger = logging.getLogger("prefect_llama.objects")


class PreconditionFailed(Exception):
    """The object is not in the generation that the request was for: somebody else wrote it, or an earlier try of ours did."""


@dataclass(frozen=True)
class Reply:
    """An answer: its headers, and its body."""

    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object."""
        return json.loads(self.body)


def send(
    place: ObjectPath,
    method: str,
    path: str,
    *arguments: str,
    body: Callable[[], Any] | None = None,
    size: int = 0,
    headers: Mapping[str, str] | None = None,
    **parameters: Any,
) -> Reply:
    """Sends a request of the JSON interface until it is answered, at most RULE.attempts times.

    place: what the request is about, for messages. path: as in the interface's reference, `{}` for each of `arguments`.
    body: makes the content anew for each try. size: bytes that travel, which decide how long it may take.
    Raises PreconditionFailed, FileNotFoundError, or StorageError with the remedy.
    """
    failures = 0
    while True:
        try:
            return _once(method, path, *arguments, body=body, size=size, headers=headers, **parameters)
        except Exception as error:
            failures += 1
            status = status_of(error)
            if not is_transient(error, status) or failures >= RULE.attempts:
                raise explained(error, status, place) from error
            seconds = RULE.seconds(failures, None)
            _logger.debug("%s %s: %s; again in %.1f s", method, place, _in_words(error, status), seconds)
            time.sleep(seconds)


def _once(
    method: str, path: str, *arguments: str, body: Callable[[], Any] | None, size: int, headers: Mapping[str, str] | None, **parameters: Any
) -> Reply:
    from fsspec.asyn import sync

    system = _file_system(bool(os.environ.get(EMULATOR)), os.environ.get(CREDENTIALS))
    given = {"headers": dict(headers or {}), "data": None if body is None else body(), **parameters}
    request = _plain_request()

    async def limited() -> tuple[int, Mapping[str, str], Any, bytes]:
        async with asyncio.timeout(_LEAST_SECONDS + size / 2**20):
            return await request(system, method, path.replace("{base}", system._location), *arguments, **given)

    answer: Any = sync(system.loop, limited)  # its annotation says None
    _, answered, _, content = answer
    return Reply(answered, content)


@functools.cache
def _file_system(emulated: bool, block: str | None) -> Any:
    """gcsfs with the credentials of this machine or of a block; with none for a server of tests. One for all threads."""
    # its support for zonal buckets imports gRPC and asks for the kind of every bucket
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from aiohttp import ClientTimeout
    from gcsfs.core import GCSFileSystem

    limits: Any = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
    token = "anon" if emulated else "google_default" if block is None else credentials_of(block)
    return GCSFileSystem(token=token, requests_timeout=limits, skip_instance_cache=True, use_listings_cache=False)


def credentials_of(block: str) -> Any:
    """The Google credentials that a Prefect block keeps. Raises StorageError where there is no such block."""
    from prefect_gcp import GcpCredentials

    try:
        loaded: Any = GcpCredentials.load(block)
    except ValueError as error:
        raise StorageError(
            errno.EPERM,
            f"{CREDENTIALS}={block!r}: {str(error).splitlines()[0][:300]} Make it in the Prefect UI (Blocks, GCP Credentials), or unset "
            f"the variable to use the credentials of this machine",
        ) from None
    return loaded.get_credentials_from_service_account()


@functools.cache
def _plain_request() -> Any:
    """gcsfs's request as it is sent once."""
    from gcsfs.core import GCSFileSystem

    return inspect.unwrap(GCSFileSystem._request)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that gcsfs made `error` of, as far as it can be told."""
    from gcsfs.retry import HttpError
    from requests.exceptions import ProxyError

    if isinstance(error, HttpError):
        code = str(error.code)
        return int(code) if code.isdigit() else None
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, FileExistsError):
        return 412
    if isinstance(error, ProxyError):
        return 502
    if isinstance(error, ValueError) and str(error).startswith("Bad Request"):
        return 400
    return 403 if isinstance(error, OSError) and str(error).startswith("Forbidden") else None


def is_transient(error: BaseException, status: int | None) -> bool:
    """Whether the same request may be answered a little later."""
    from aiohttp import ClientError
    from google.auth.exceptions import GoogleAuthError, TransportError

    if status is not None:
        return is_retried(status)
    if isinstance(error, GoogleAuthError):
        return isinstance(error, TransportError) or error.retryable
    return isinstance(error, ClientError | TimeoutError | ConnectionError)


def explained(error: BaseException, status: int | None, place: ObjectPath) -> BaseException:
    """What to raise instead of `error`, from a request about `place`."""
    from google.auth.exceptions import GoogleAuthError

    if status == 412:
        return PreconditionFailed(f"{place} was written by somebody else meanwhile")
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "there is no such object", str(place))
    said = _in_words(error, status)
    if status == 403:
        return StorageError(
            errno.EACCES,
            f"no permission for {place} ({said}): grant {ROLE} on gs://{place.bucket} to the account that runs this",
        )
    if status == 401 or isinstance(error, GoogleAuthError):
        return StorageError(
            errno.EPERM,
            f"no valid Google credentials for {place} ({said}): run `gcloud auth application-default login`, or on Google Cloud give "
            f"the machine a service account that has {ROLE} on gs://{place.bucket}",
        )
    if is_transient(error, status):
        return StorageError(
            errno.EIO,
            f"{place} did not answer in {RULE.attempts} tries ({said}): run the same command again later, it continues where it stopped",
        )
    return StorageError(errno.EIO, f"the request about {place} was refused ({said})")


def bucket_missing(place: ObjectPath) -> StorageError:
    """For a request that only a missing bucket can have failed."""
    return StorageError(
        errno.ENOENT,
        f"there is no bucket gs://{place.bucket}: create it in the region of the slice "
        f"(`gcloud storage buckets create gs://{place.bucket} --location=REGION`), or correct --root",
    )


def _in_words(error: BaseException, status: int | None) -> str:
    text = str(error).splitlines()[-1] if str(error) else type(error).__name__
    return f"{status}: {text[:300]}" if status is not None else text[:300]
