"""Steps as Prefect tasks: Prefect decides what runs, and the manifest of the artifact is its only cache record.

`@step_task` wraps a body `fn(step, directory, inputs) -> stats` into a task `(step, root, inputs) -> Artifact` whose cache
key is the artifact's directory and fingerprint, under a lease. Committed artifacts are reused without any record on the
server; nothing but JSON made here from a checked manifest is ever decoded as a result.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.filesystems import WritableFileSystem
from prefect.logging import get_logger, get_run_logger
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import JSONSerializer
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE
from prefect.transactions import IsolationLevel, get_transaction

from tasks.artifacts import Artifact, ArtifactError, ArtifactMissing, check, commit, discard_damaged, empty_directory, open_artifact
from tasks.leases import LeaseLockManager
from tasks.manifests import manifest_path
from tasks.steps import Step
from tasks.storage import check_writable, make_directory, storage_errors

P = ParamSpec("P")
R = TypeVar("R")

# Not a path: Prefect opens a result's key as a file, wherever it lies, when it is an absolute path and no storage is known
_KEY_PREFIX = "artifact:"


@dataclass(frozen=True)
class StepOutput:
    """What a body returns when it chooses the artifact's files itself; `files` None means everything in the directory."""

    stats: dict[str, Any]
    files: Iterable[str | Path] | None = None


StepBody = Callable[[Step, Path, tuple[Artifact, ...]], StepOutput | Mapping[str, Any]]


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """The logger of the current Prefect run, or a plain one outside of a run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("steps")


def _tell_run(level: int, message: str) -> None:
    run_logger().log(level, message)


def cache_key(step: Step, root: str | Path) -> str:
    """The key of a step's artifact for Prefect: `artifact:{absolute directory}@{fingerprint}`."""
    return f"{_KEY_PREFIX}{step.directory(root).absolute()}@{step.fingerprint}"


def parse_cache_key(key: str) -> tuple[Path, str]:
    """The directory and fingerprint in a key made by `cache_key`; raises ValueError for any other text."""
    directory, separator, fingerprint = key.removeprefix(_KEY_PREFIX).rpartition("@")
    if not key.startswith(_KEY_PREFIX) or not separator or not Path(directory).is_absolute() or len(fingerprint) != 64:
        raise ValueError(f"{key[:200]!r} is not the key of a step's artifact")
    return Path(directory), fingerprint


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
_still_owner: ContextVar[Callable[[], None] | None] = ContextVar("still_owner", default=None)


class StepTask(Task[P, R]):
    """A Prefect task for a kind of step. `forced()` is the same task that runs although its artifact is committed."""

    def with_options(self, **options: Any) -> StepTask[P, R]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As Prefect's `with_options`; the result storage stays."""
        # Prefect takes no storage that is not saved on a server, so it is put back after the copy is made
        plain = super().with_options(**{**options, "result_storage": None})
        plain.__class__ = StepTask
        plain.result_storage = self.result_storage
        return cast("StepTask[P, R]", plain)

    def forced(self) -> StepTask[P, R]:
        """The task with `refresh_cache`: it empties the artifact's directory and makes it again."""
        return self.with_options(refresh_cache=True)


def step_task(
    *, description: str, retries: int = 0, tags: Iterable[str] = (), name: str | None = None, leases: LeaseLockManager = LEASES
) -> Callable[[StepBody], StepTask[[Step, str, list[Artifact]], Artifact]]:
    """Makes a step's body a Prefect task `(step, root, inputs) -> Artifact`.

    The body gets the step, its existing directory, and the verified inputs in the order of `step.upstream`; it returns
    the stats for the manifest, or a StepOutput. It may find what an interrupted run of the same step left, and continue.
    A body that fails leaves no manifest. description, retries, tags, name: as in Prefect; name defaults to the body's.
    """

    def decorate(body: StepBody) -> StepTask[[Step, str, list[Artifact]], Artifact]:
        def run(step: Step, root: str, inputs: list[Artifact]) -> Artifact:
            return run_step(body, step, root, inputs)

        label = name or body.__name__.removesuffix("_body")
        run.__name__ = run.__qualname__ = label
        run.__module__ = body.__module__
        run.__doc__ = body.__doc__
        task: StepTask[[Step, str, list[Artifact]], Artifact] = StepTask(
            run,
            name=label,
            description=description,
            retries=retries,
            tags=list(tags),
            task_run_name="{step.kind} {step.name}",
            cache_policy=StepCachePolicy(isolation_level=IsolationLevel.SERIALIZABLE, lock_manager=leases),
            persist_result=True,
            result_serializer="json",
            cache_result_in_memory=False,
        )
        task.result_storage = RECORDS
        return task

    return decorate


def run_step(body: StepBody, step: Step, root: str, inputs: Iterable[Artifact]) -> Artifact:
    """Runs `body` for `step` and commits what it made; the part of a step task that Prefect calls on a cache miss.

    Raises ValueError when `inputs` are not the artifacts of `step.upstream`, ArtifactError for a damaged input,
    LeaseLost when another process took the step over, StorageError for a full or read-only disk.
    """
    directory = step.directory(root)
    verified = _verified_inputs(step, tuple(inputs))
    check_writable(directory)
    still_owner = _lease_check(cache_key(step, root))
    prepared = _prepare(directory, step, root)
    if isinstance(prepared, Artifact):
        return prepared
    run_logger().info("%s %s runs: %s", step.kind, step.name, prepared)
    make_directory(directory)
    token = _still_owner.set(still_owner)
    try:
        with storage_errors(directory, only_full=True):
            output = body(step, directory, verified)
    finally:
        _still_owner.reset(token)
    if not isinstance(output, StepOutput):
        output = StepOutput(dict(output))
    return commit(directory, step, files=output.files, stats=output.stats, still_owner=still_owner)


def _verified_inputs(step: Step, inputs: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    wanted = [f"{upstream.kind}/{upstream.name} {upstream.fingerprint[:16]}" for upstream in step.upstream]
    given = [f"{artifact.kind}/{artifact.name} {artifact.fingerprint[:16]}" for artifact in inputs]
    if [artifact.fingerprint for artifact in inputs] != [upstream.fingerprint for upstream in step.upstream]:
        raise ValueError(
            f"the inputs of {step.kind} {step.name} must be [{', '.join(wanted)}], in this order, but are [{', '.join(given)}]"
        )
    return tuple(open_artifact(artifact.path, artifact.fingerprint) for artifact in inputs)


def assert_still_owner() -> None:
    """For long bodies: raises LeaseLost when another process has taken over the step that is running here."""
    still_owner = _still_owner.get()
    if still_owner is not None:
        still_owner()


def _lease_check(key: str) -> Callable[[], None]:
    """A function that raises LeaseLost unless the transaction around this task run still holds the lease on `key`."""
    current = get_transaction()
    manager = None if current is None or current.store is None else current.store.lock_manager
    if current is None or current.key != key or not isinstance(manager, LeaseLockManager):
        raise RuntimeError(f"the step task was called without its lease on {key}: call the task itself, with `step` and `root`")
    still_owner = partial(manager.assert_held, key, manager.held_by(key))
    still_owner()
    return still_owner


def _prepare(directory: Path, step: Step, root: str) -> Artifact | str:
    """Puts the directory into the state in which the body can start, and says why it runs.

    Returns the artifact instead if it turns out to be usable as it is.
    """
    if _is_forced():
        empty_directory(directory)
        return "asked to run again"
    if not os.path.lexists(manifest_path(directory)):
        return step.explain_miss(root)
    try:
        return open_artifact(directory, step.fingerprint)
    except ArtifactError:
        damages = check(directory, step.fingerprint, hashes=True)
    reason = f"its files are damaged: {'; '.join(map(str, damages[:8]))}"
    run_logger().warning("%s %s in %s: %s; rebuilding", step.kind, step.name, directory, reason)
    discard_damaged(directory, damages, reason)
    return reason


def _is_forced() -> bool:
    """Whether this is the first attempt of a task run that must not use the cache; later attempts continue the first."""
    context = TaskRunContext.get()
    if context is None or context.task_run.run_count > 1:
        return False
    refresh = context.task.refresh_cache
    return PREFECT_TASKS_REFRESH_CACHE.value() if refresh is None else refresh
