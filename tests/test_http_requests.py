"""HTTP answers: which can pass, which stay, and what is said of them."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import httpx
import pytest

from tasks.sources import DataError
from tasks.sources.http_requests import answered, length_of, version_of
from tasks.sources.request_limits import Unavailable

URL = "https://me:secret@host/a.bin?signature=secret"


def raising(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return answer


def untrusted() -> httpx.ConnectError:
    error = httpx.ConnectError("certificate verify failed")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
    return error


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (raising(untrusted()), DataError, r"https://host/a\.bin: the server's certificate is not trusted"),
        (raising(httpx.ReadTimeout("")), Unavailable, r"https://host/a\.bin: ReadTimeout"),
        (raising(httpx.UnsupportedProtocol("ftp")), DataError, "cannot be asked for"),
        (lambda request: httpx.Response(302, headers={"Location": str(request.url)}), DataError, "TooManyRedirects"),
        (lambda request: httpx.Response(401), DataError, r"answered 401 Unauthorized: its server wants a user and password"),
        (lambda request: httpx.Response(408), Unavailable, "answered 408"),
        (lambda request: httpx.Response(418), DataError, "answered 418"),
        (lambda request: httpx.Response(504), Unavailable, "answered 504"),
    ],
)
def test_errors_are_told_apart_by_whether_they_can_pass(
    answer: Callable[[httpx.Request], httpx.Response], kind: type[Exception], words: str
) -> None:
    with httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=True) as client:
        with pytest.raises(kind, match=words) as raised, answered(client, "GET", URL):
            pytest.fail("there is no answer to use")
        assert "secret" not in str(raised.value)


def test_size_and_version_are_read_from_headers() -> None:
    assert length_of(httpx.Headers({"Content-Range": "bytes 0-0/70", "Content-Length": "1"})) == 70
    assert length_of(httpx.Headers({"Content-Range": "bytes 0-0/*"})) is None
    assert length_of(httpx.Headers({"Content-Length": "7"})) == 7
    assert length_of(httpx.Headers({})) is None
    assert version_of(httpx.Headers({"ETag": 'W/"a"', "Last-Modified": "x"})) == 'etag:W/"a"'
    assert version_of(httpx.Headers({"Last-Modified": "x"})) == "modified:x"
    assert version_of(httpx.Headers({})) is None
