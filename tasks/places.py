"""Where artifacts lie: a directory of this machine, or a prefix of a bucket, `gs://bucket/prefix`.

Work always happens in a directory of this machine. What lies in a bucket is worked on in its copy below the cache,
`$PREFECT_LLAMA_CACHE/gs/{bucket}/{prefix}`, which has the layout of the bucket, so that relative paths hold in both.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

SCHEME = "gs://"
CACHE_VARIABLE = "PREFECT_LLAMA_CACHE"
# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A name in a bucket, of an object or of all objects below it; `key` has no slash at its ends, and "" is the bucket itself."""

    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, url: str) -> ObjectPath:
        """From `gs://bucket/prefix`. Raises ValueError for anything else."""
        bucket, _, key = url.removeprefix(SCHEME).partition("/")
        parts = [part for part in key.split("/") if part]
        if not url.startswith(SCHEME) or not _BUCKET.fullmatch(bucket) or any(part in (".", "..") for part in parts):
            raise ValueError(f"{url[:200]!r} is no place in a bucket: write gs://bucket/prefix, with a bucket's name as Google allows it")
        return cls(bucket, "/".join(parts))

    def __truediv__(self, relative: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{relative}" if self.key else relative)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}" if self.key else f"{SCHEME}{self.bucket}"

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def console_url(self) -> str:
        """Where a browser shows it."""
        return f"https://console.cloud.google.com/storage/browser/{self.bucket}/{self.key}"

    @property
    def parent(self) -> ObjectPath:
        """All but the last part of the name; a bucket is its own parent."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])


Place = Path | ObjectPath


def place_of(text: str | Place) -> Place:
    """The place that `text` names. Raises ValueError for a URL of any other storage."""
    if not isinstance(text, str):
        return text
    if text.startswith(SCHEME):
        return ObjectPath.parse(text)
    if "://" in text and not text.startswith("file://"):
        raise ValueError(f"{text[:200]!r}: artifacts lie in a directory or in gs://bucket/prefix; give one of these")
    return Path(text.removeprefix("file://"))


def absolute(place: Place) -> Place:
    """The place as every process of this machine writes it."""
    return place.absolute() if isinstance(place, Path) else place


def resolved(place: Place) -> Place:
    """The one way to write the place, however many links lead there."""
    return place.resolve() if isinstance(place, Path) else place


def working_directory(place: Place) -> Path:
    """Where the files of `place` are on this machine: there, or in its copy below the cache."""
    if isinstance(place, Path):
        return place
    return cache_directory() / "gs" / place.bucket / place.key


def place_of_working(directory: Path) -> Place:
    """The place that `directory` is the `working_directory` of."""
    copies = cache_directory() / "gs"
    if not directory.is_relative_to(copies):
        return directory
    bucket, *key = directory.relative_to(copies).parts
    return ObjectPath(bucket, "/".join(key))


def cache_directory() -> Path:
    """`$PREFECT_LLAMA_CACHE`, else the user's cache directory of this platform."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("prefect-llama", appauthor=False)
