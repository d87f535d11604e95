"""File systems by URL: what their words about a file mean, and which of their errors can pass."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tasks.sources import DataError
from tasks.sources.filesystems import filesystem_errors, is_changed, versions_in
from tasks.sources.request_limits import Unavailable


@pytest.mark.parametrize(
    ("info", "versions"),
    [
        ({"md5Hash": "1B2M2Y8AsgTpgAmY7PhCfg==", "generation": "17"}, ("md5:d41d8cd98f00b204e9800998ecf8427e", "generation:17")),
        ({"md5": "d41d8cd98f00b204e9800998ecf8427e"}, ("md5:d41d8cd98f00b204e9800998ecf8427e",)),
        ({"md5Hash": "nonsense"}, ()),
        ({"ETag": '"abc-2"', "LastModified": "someday"}, ("etag:abc-2", "modified:someday")),
        ({"mtime": 12.5, "created": datetime(1970, 1, 1, 0, 0, 12, 500000)}, ("modified:1970-01-01T00:00:12.500000+00:00",)),
        ({"updated": "1970-01-01T00:00:12.500Z"}, ("modified:1970-01-01T00:00:12.500000+00:00",)),
        ({"size": 3}, ()),
    ],
)
def test_what_file_systems_say_becomes_a_version(info: dict[str, Any], versions: tuple[str, ...]) -> None:
    assert versions_in(info) == versions


def test_only_what_speaks_of_the_planned_version_can_contradict_it() -> None:
    assert not is_changed("etag:a", ("md5:b", "etag:a"))
    assert not is_changed("etag:a", ("modified:x",))
    assert is_changed("etag:a", ("modified:x", "etag:b"))
    assert not is_changed(None, ("etag:b",))


class Answered(Exception):
    def __init__(self, code: int) -> None:
        super().__init__("https://host/x?signature=secret")
        self.code = code


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FileNotFoundError("x"), DataError, "there is no such file"),
        (PermissionError("x"), DataError, "no permission"),
        (ValueError("Anonymous caller"), DataError, "cannot be read"),
        (Answered(404), DataError, "answered 404"),
        (Answered(429), Unavailable, "Answered"),
        (Answered(503), Unavailable, "Answered"),
        (ConnectionResetError("reset"), Unavailable, "reset"),
        (Unavailable("mine"), Unavailable, "mine"),
    ],
)
def test_errors_are_told_apart_by_whether_they_can_pass(error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as raised, filesystem_errors("gs://bucket/a.txt?sig=secret"):
        raise error
    assert "secret" not in str(raised.value)
