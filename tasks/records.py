"""How Prefect finds a step's result: its cache key, its lease, and a result storage that has no records of its own.

A result is read from the manifest of the artifact, checked, every time. Committed artifacts are therefore reused without
any record on the server, and nothing but JSON made here is ever decoded as a result.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.filesystems import WritableFileSystem
from prefect.logging import get_logger, get_run_logger
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import JSONSerializer

from tasks.artifacts import Artifact, ArtifactMissing, check, open_artifact
from tasks.lease_store import KEY_PREFIX, directory_of
from tasks.leases import LeaseLockManager
from tasks.places import Place, absolute, place_of, resolved
from tasks.steps import Step


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """The logger of the current Prefect run, or a plain one outside of a run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("steps")


def _tell_run(level: int, message: str) -> None:
    run_logger().log(level, message)


def cache_key(step: Step, root: str | Place) -> str:
    """The key of a step's artifact for Prefect: `artifact:{absolute directory, or place in a bucket}@{fingerprint}`.

    However `root` is written, one directory has one key, or two processes would hold different leases on it.
    """
    return f"{KEY_PREFIX}{step.directory(resolved(place_of(root)))}@{step.fingerprint}"


def parse_cache_key(key: str) -> tuple[Place, str]:
    """The directory and fingerprint in a key made by `cache_key`; raises ValueError for any other text."""
    directory, fingerprint = directory_of(key), key.rpartition("@")[2]
    if not key.startswith(KEY_PREFIX) or directory != absolute(directory) or len(fingerprint) != 64:
        raise ValueError(f"{key[:200]!r} is not the key of a step's artifact")
    return directory, fingerprint


class StepLeases(LeaseLockManager):
    """Leases for the keys of steps, telling what they do in the log of the Prefect run."""

    def __init__(self, heartbeat_seconds: float = 30.0, expiry_seconds: float = 90.0, poll_seconds: float = 0.5) -> None:
        super().__init__(heartbeat_seconds, expiry_seconds, poll_seconds, _tell_run)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments[:3]


@dataclass
class StepCachePolicy(CachePolicy):
    """The cache key of a step task, from its parameters `step` and `root` and nothing else."""

    def compute_key(self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any) -> str:
        """`cache_key(step, root)`; no run id and no other input takes part."""
        return cache_key(inputs["step"], inputs["root"])


class ManifestRecords(WritableFileSystem):
    """Prefect's result storage without records: a result is read from the manifest of the artifact, checked, every time."""

    _block_type_name = "prefect-llama manifests"
    _block_type_slug = "prefect-llama-manifests"

    def _resolve_path(self, path: str) -> None:
        # asked by Prefect's ResultStore, which would otherwise take a key for a path below a base directory
        return None

    def read_path(self, path: str, **_: Any) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The JSON result record of the committed artifact that the key `path` names; raises ArtifactError if it has damage."""
        directory, fingerprint = parse_cache_key(path)
        return _record(path, open_artifact(directory, fingerprint))

    def write_path(self, path: str, content: bytes, **_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Stores nothing: checks that the artifact which `content` tells of is committed; raises ArtifactMissing if not."""
        if not path.startswith(KEY_PREFIX):
            return  # the exception of a run that failed: Prefect's record of its state has the message
        directory, fingerprint = parse_cache_key(path)
        if damages := check(directory, fingerprint, hashes=False):
            raise ArtifactMissing(f"the artifact in {directory} is not committed: {damages[0]}")

    async def aread_path(self, path: str) -> bytes:
        """As `read_path`."""
        return self.read_path(path)

    async def awrite_path(self, path: str, content: bytes) -> None:
        """As `write_path`."""
        self.write_path(path, content)


def _record(key: str, artifact: Artifact) -> bytes:
    metadata = ResultRecordMetadata(storage_key=key, serializer=JSONSerializer())
    return ResultRecord(metadata=metadata, result=artifact).serialize()


LEASES = StepLeases()
RECORDS = ManifestRecords()
