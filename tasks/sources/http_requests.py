"""HTTP as sources and downloads need it: bytes as they are stored, the Hub's token for the Hub only, errors with a remedy."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn
from urllib.parse import urlsplit

import httpx

from tasks.sources.request_limits import Unavailable, is_retried, retry_after_seconds
from tasks.sources.source_file import DataError, public_location

_CONNECT_SECONDS = 10.0
# between two pieces of an answer, not for the whole of it
_READ_SECONDS = 30.0
_PORTS = {"http": 80, "https": 443}
_NO_HEAD = (400, 401, 403, 405, 501)


def open_client(connections: int = 1) -> httpx.Client:
    """A client that threads can share."""
    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections),
        headers={"Accept-Encoding": "identity", "User-Agent": "prefect-llama"},
    )


def hub_endpoint() -> str:
    """The Hugging Face Hub that is used: HF_ENDPOINT, else the public one."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@contextmanager
def answered(
    client: httpx.Client, method: str, location: str, headers: dict[str, str] | None = None, *, also: tuple[int, ...] = ()
) -> Iterator[httpx.Response]:
    """The answer to a request, with a status of 200, 206 or 416 or one of `also`, and its body unread.

    Raises Unavailable for what can pass, also while the body is read: no connection, a cut one, 408, 429, 5xx. Raises
    DataError for every other status. Neither names a user, a password or a query.
    """
    place = public_location(location)
    try:
        with client.stream(method, location, headers={**_authorization(location), **(headers or {})}) as response:
            if response.status_code not in (200, 206, 416, *also):
                _refuse(response, place)
            yield response
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise DataError(f"{place} cannot be asked for ({type(error).__name__}); correct the URL") from None
    except httpx.TransportError as error:
        if _certificate_refused(error):
            raise DataError(f"{place}: the server's certificate is not trusted ({error}); correct the URL or SSL_CERT_FILE") from None
        raise Unavailable(f"{place}: {str(error) or type(error).__name__}") from None


def inquire(client: httpx.Client, location: str) -> tuple[int | None, str | None]:
    """Size and version by HEAD or, where a server refuses that (a signed URL is for one method), by a GET of one byte."""
    with answered(client, "HEAD", location, also=_NO_HEAD) as response:
        if response.status_code == 200 and (size := length_of(response.headers)) is not None:
            return size, version_of(response.headers)
    with answered(client, "GET", location, {"Range": "bytes=0-0"}) as response:
        # an empty file has no first byte
        return length_of(response.headers), version_of(response.headers)


def version_of(headers: httpx.Headers) -> str | None:
    """What tells one state of a file from another, of an HTTP answer: its ETag, else when it was last modified."""
    if etag := headers.get("ETag"):
        return f"etag:{etag}"
    modified = headers.get("Last-Modified")
    return f"modified:{modified}" if modified else None


def length_of(headers: httpx.Headers) -> int | None:
    """The size in an answer's Content-Length, or the total in its Content-Range."""
    total = headers["Content-Range"].rpartition("/")[2] if "Content-Range" in headers else headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None


def _authorization(location: str) -> dict[str, str]:
    """The Hub's token, for the Hub itself. httpx drops it where a redirect leads to another host."""
    url = urlsplit(location)
    if url.username or _origin(location) != _origin(hub_endpoint()):
        return {}
    from huggingface_hub.utils import build_hf_headers

    # Accept-Encoding and the like stay the client's own
    return {name: value for name, value in build_hf_headers().items() if name.lower() == "authorization"}


def _origin(location: str) -> tuple[str, str | None, int | None]:
    url = urlsplit(location)
    return url.scheme, url.hostname, url.port or _PORTS.get(url.scheme)


def _refuse(response: httpx.Response, place: str) -> NoReturn:
    status = response.status_code
    answer = f"{place} answered {status} {response.reason_phrase}".rstrip()
    if is_retried(status):
        after = retry_after_seconds(response.headers.get("Retry-After"))
        raise Unavailable(answer, retry_after=after, everyone=status == 429 or (status == 503 and after is not None))
    if status in (401, 403) and _origin(place) == _origin(hub_endpoint()):
        remedy = "log in with `hf auth login` or set HF_TOKEN and, where the repository is gated, accept its licence on its page"
    elif status in (401, 403):
        remedy = "its server wants a user and password, or the signature in the URL is wrong or has run out; correct the URL"
    elif status in (404, 410):
        remedy = "there is no such file; correct the URL"
    else:
        remedy = "correct the URL"
    raise DataError(f"{answer}: {remedy}")


def _certificate_refused(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None
