"""Steps as Prefect tasks: `@step_task` wraps a body `fn(step, directory, inputs) -> stats` into a task.

The task is `(step, root, inputs) -> Artifact`. Prefect decides what runs, by the key and the leases of `tasks.records`;
here a step that has to run is explained, prepared, run and committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE
from prefect.transactions import IsolationLevel, get_transaction

from tasks.artifact_store import artifact_store
from tasks.artifacts import (
    Artifact,
    ArtifactError,
    FileEntry,
    brought_here,
    check,
    check_writable,
    commit,
    discard_damaged,
    empty_directory,
    open_artifact,
)
from tasks.leases import LeaseLockManager
from tasks.places import Place, working_directory
from tasks.records import LEASES, RECORDS, StepCachePolicy, cache_key, parse_cache_key, run_logger
from tasks.steps import Step
from tasks.storage import storage_errors

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class StepOutput:
    """What a body returns when it chooses the artifact's files itself; `files` None means everything in the directory.

    stored: what it wrote straight into the bucket where the artifact is to lie.
    """

    stats: dict[str, Any]
    files: Iterable[str | Path] | None = None
    stored: Iterable[FileEntry] = ()


StepBody = Callable[[Step, Path, tuple[Artifact, ...]], StepOutput | Mapping[str, Any]]


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

    The body gets the step, an existing directory of this machine, and the verified inputs, on this machine too, in the
    order of `step.upstream`; it returns the stats for the manifest, or a StepOutput. It may find what an interrupted run of
    the same step left here, and continue. A body that fails leaves no manifest.
    description, retries, tags, name: as in Prefect; name defaults to the body's.
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
    key = cache_key(step, root)
    directory, _ = parse_cache_key(key)
    verified = _verified_inputs(step, tuple(inputs))
    check_writable(directory)
    still_owner = _lease_check(key)
    prepared = _prepare(directory, step, root)
    if isinstance(prepared, Artifact):
        return prepared
    if prepared:
        run_logger().info("%s %s runs: %s", step.kind, step.name, prepared)
    artifact_store(directory).prepare()
    here = working_directory(directory)
    token = _still_owner.set(still_owner)
    try:
        with storage_errors(here, only_full=True):
            output = body(step, here, verified)
    finally:
        _still_owner.reset(token)
    if not isinstance(output, StepOutput):
        output = StepOutput(dict(output))
    return commit(directory, step, files=output.files, stored=output.stored, stats=output.stats, still_owner=still_owner)


def _verified_inputs(step: Step, inputs: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    wanted = [f"{upstream.kind}/{upstream.name} {upstream.fingerprint[:16]}" for upstream in step.upstream]
    given = [f"{artifact.kind}/{artifact.name} {artifact.fingerprint[:16]}" for artifact in inputs]
    if [artifact.fingerprint for artifact in inputs] != [upstream.fingerprint for upstream in step.upstream]:
        raise ValueError(
            f"the inputs of {step.kind} {step.name} must be [{', '.join(wanted)}], in this order, but are [{', '.join(given)}]"
        )
    return tuple(brought_here(open_artifact(artifact.path, artifact.fingerprint)) for artifact in inputs)


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


def _prepare(directory: Place, step: Step, root: str) -> Artifact | str:
    """Puts the directory into the state in which the body can start; the reason why it runs, "" if that is already told.

    Returns the artifact instead if it turns out to be usable as it is.
    """
    if _is_forced():
        empty_directory(directory)
        return "asked to run again"
    if not artifact_store(directory).has_manifest():
        return step.explain_miss(root)
    try:
        return open_artifact(directory, step.fingerprint)
    except ArtifactError:
        damages = check(directory, step.fingerprint, hashes=True)
    reason = f"its files are damaged: {'; '.join(map(str, damages[:8]))}"
    run_logger().warning("%s %s in %s: %s; rebuilding", step.kind, step.name, directory, reason)
    discard_damaged(directory, damages, reason)
    return ""


def _is_forced() -> bool:
    """Whether this is the first attempt of a task run that must not use the cache; later attempts continue the first."""
    context = TaskRunContext.get()
    if context is None or context.task_run.run_count > 1:
        return False
    refresh = context.task.refresh_cache
    return PREFECT_TASKS_REFRESH_CACHE.value() if refresh is None else refresh
