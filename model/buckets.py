"""A run's files in a bucket, `gs://bucket/prefix`, by the same calls as files on a disk: Orbax's way to reach them, `etils.epath`.

Listings are never remembered: what another process wrote must be seen. TensorStore, which writes the arrays, has its own way.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from model.durable import json_text, write_json

SCHEME = "gs://"
EMULATOR = "STORAGE_EMULATOR_HOST"  # a storage server for tests, as Google's own clients are told of it
TENSORSTORE_EMULATOR = "TENSORSTORE_GCS_HTTP_URL"
# TensorFlow's client stays out of the trainer. Read once, at the first path of any kind, so it is set before Orbax is imported.
os.environ.setdefault("EPATH_USE_TF", "false")
# gcsfs asks what kind a bucket is at every turn, which needs a permission more; buckets of any kind answer the usual calls.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


class StoredFile(NamedTuple):
    """What a bucket states about a file: bytes, and the MD5 in hexadecimal, which objects composed of others lack."""

    size: int
    md5: str | None


def path_of(text: str | Path) -> Path:
    """`text` as a path that can be opened, listed and extended: of this machine, or in a bucket."""
    if not str(text).startswith(SCHEME):
        return Path(text)
    _use_gcsfs()
    from etils import epath

    return cast(Path, epath.Path(str(text)))


def absolute(path: Path) -> Path:
    """The path as every process of this machine writes it."""
    return path if in_bucket(path) else path.expanduser().absolute()


def in_bucket(path: Path) -> bool:
    """Whether `path` is one in a bucket."""
    return str(path).startswith(SCHEME)


def stored_files(directory: Path) -> Mapping[str, StoredFile]:
    """What the bucket has below `directory`, by relative path, from one listing."""
    return {name: StoredFile(int(found["size"]), _hexadecimal(found.get("md5Hash"))) for name, found in _listed(directory).items()}


def write_everywhere(path: Path, value: Any) -> None:
    """Writes `value` as JSON to a path of this machine or in a bucket; who reads it finds the old content or the new."""
    if in_bucket(path):
        path.write_text(json_text(value))
    else:
        write_json(path, value)


def remove_tree(directory: Path) -> None:
    """Removes a directory and what is below it, if it is there."""
    if not in_bucket(directory):
        shutil.rmtree(directory, ignore_errors=True)
    elif directory.is_dir():
        _file_system().rm(str(directory), recursive=True)


def set_aside(directory: Path, name: str) -> None:
    """Gives a directory another name beside its own. In a bucket its objects are copied there, then deleted, as Google has no rename."""
    target = directory.parent / name
    if not in_bucket(directory):
        directory.rename(target)
        return
    files = _file_system()
    for relative in _listed(directory):
        files.cp_file(f"{directory}/{relative}", f"{target}/{relative}")
    files.rm(str(directory), recursive=True)


def _listed(directory: Path) -> dict[str, dict[str, Any]]:
    prefix = str(directory).removeprefix(SCHEME) + "/"
    found = _file_system().find(str(directory), detail=True)
    return {name.removeprefix(prefix): entry for name, entry in found.items() if not name.endswith("/")}


def _file_system() -> Any:
    import fsspec

    _use_gcsfs()
    return fsspec.filesystem("gcs")


def _use_gcsfs() -> None:
    """Before the first use: files are written in one request, gcsfs keeps no listing, and all ask the same server."""
    import fsspec.config

    fsspec.register_implementation("gcs", "model.bucket_writes.WholeFiles", clobber=True)
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    if os.environ.get(EMULATOR):
        os.environ.setdefault(TENSORSTORE_EMULATOR, os.environ[EMULATOR])


def _hexadecimal(digest: str | None) -> str | None:
    return None if digest is None else base64.b64decode(digest).hex()
