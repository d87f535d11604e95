"""Steps under Prefect: reused, explained, rebuilt when damaged, done once by two processes, and never unpickled."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cloudpickle
import pytest

os.environ.update(PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")

from prefect import flow
from prefect.cache_policies import CachePolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from tasks.artifacts import Artifact, ArtifactDamaged, StorageError, commit, open_artifact, read_manifest
from tasks.caching import StepTask, assert_still_owner, run_step, step_task
from tasks.leases import LeaseLost
from tasks.records import RECORDS, cache_key
from tasks.steps import Step
from tests.step_flow import leases, pickle_record, raw, read_until, runs, start, states, steps, tokens, two_steps


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    """A Prefect server for this file; returns its API URL."""
    with prefect_test_harness(server_startup_timeout=120), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield str(PREFECT_API_URL.value())


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


def test_the_second_run_reuses_every_step(root: str):
    first = two_steps(root, return_state=True)
    second = two_steps(root, return_state=True)
    assert first.result() == second.result()
    assert runs(root) == ["raw", "tokens"]
    assert states(first.state_details.flow_run_id) == {"raw x": "Completed", "tokens x": "Completed"}
    assert states(second.state_details.flow_run_id) == {"raw x": "Cached", "tokens x": "Cached"}


def test_the_result_is_the_verified_artifact(root: str):
    artifact = two_steps(root)
    assert artifact == open_artifact(artifact.path, steps()[1].fingerprint)
    assert Path(artifact.path, "tokens.txt").read_text() == "ALPHA"
    manifest = read_manifest(artifact.path)
    assert manifest is not None
    assert [entry.path for entry in manifest.files] == ["tokens.txt"]
    assert manifest.upstream == [steps()[0].fingerprint]


def test_a_runtime_field_is_a_hit_and_an_identity_field_a_miss_with_its_reason(root: str, caplog: pytest.LogCaptureFixture):
    two_steps(root)
    two_steps(root, workers=9)
    assert runs(root) == ["raw", "tokens"]
    two_steps(root, text="beta")
    assert runs(root) == ["raw", "tokens", "raw", "tokens"]
    assert 'raw x runs: text: "alpha" -> "beta"' in caplog.messages
    assert 'tokens x runs: rebuilt because raw/x changed (text: "alpha" -> "beta")' in caplog.messages


def test_what_was_committed_without_any_record_on_the_server_is_reused(root: str):
    """As after the loss of the server's database: the manifests are all there is."""
    for step, name in zip(steps(), ("text.txt", "tokens.txt"), strict=True):
        directory = step.directory(root)
        directory.mkdir(parents=True)
        (directory / name).write_text("made elsewhere")
        commit(directory, step, stats={})
    artifact = two_steps(root)
    assert Path(artifact.path, "tokens.txt").read_text() == "made elsewhere"
    assert runs(root) == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda file: file.unlink(), "text.txt is missing"),
        (lambda file: file.write_text(""), "text.txt has 0 bytes instead of 5"),
        (lambda file: file.write_text("alphb"), "text.txt has other contents"),
        (lambda file: (file.parent / "manifest.json").write_text("{"), "manifest.json is not JSON"),
    ],
)
def test_damage_is_named_and_rebuilt(root: str, caplog: pytest.LogCaptureFixture, damage, named: str):
    two_steps(root)
    directory = steps()[0].directory(root)
    damage(directory / "text.txt")
    two_steps(root)
    assert runs(root) == ["raw", "tokens", "raw"]
    assert (directory / "text.txt").read_text() == "alpha"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert named in warning.message
    assert warning.message.endswith("rebuilding")
    assert open_artifact(directory, steps()[0].fingerprint)


def test_a_damaged_file_is_gone_before_the_body_runs(root: str):
    """A body that continues from what it finds must not take a damaged file for its own work."""
    seen: list[list[str]] = []

    def look_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, int]:
        seen.append(sorted(path.name for path in directory.iterdir() if not path.name.startswith(".")))
        for name in ("good", "bad"):
            (directory / name).write_text(name)
        return {}

    look = step_task(description="look")(look_body)
    step = steps()[0]
    run = flow(name="look")(lambda: look(step, root, []))
    run()
    (step.directory(root) / "bad").write_text("dab")
    run()
    assert seen == [[], ["good"]]


def test_a_forced_step_starts_from_nothing(root: str):
    two_steps(root)
    (steps()[0].directory(root) / "leftover").write_text("x")
    two_steps(root, force=True)
    assert runs(root) == ["raw", "tokens", "raw"]
    assert not (steps()[0].directory(root) / "leftover").exists()
    two_steps(root)
    assert runs(root) == ["raw", "tokens", "raw"]


def failing(seen: list[bool], *, retries: int = 0) -> StepTask[[Step, str, list[Artifact]], Artifact]:
    """A step whose body fails the first time, and tells whether it found its own partial file."""

    def fail_once_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, int]:
        seen.append((directory / "part").exists())
        (directory / "part").write_text("x")
        if len(seen) == 1:
            raise RuntimeError("no luck")
        return {}

    return step_task(description="fail once", retries=retries)(fail_once_body)


@pytest.mark.parametrize("force", [False, True])
def test_a_retry_continues_what_the_failed_attempt_left(root: str, force: bool):
    seen: list[bool] = []
    task = failing(seen, retries=1)
    step = steps()[0]
    flow(name="retry")(lambda: (task.forced() if force else task)(step, root, []))()
    assert seen == [False, True]


def test_a_failed_step_leaves_no_manifest_and_the_next_run_continues(root: str, caplog: pytest.LogCaptureFixture):
    seen: list[bool] = []
    task = failing(seen)
    step = steps()[0]
    run = flow(name="fail")(lambda: task(step, root, []))
    with pytest.raises(RuntimeError, match="no luck"):
        run()
    assert read_manifest(step.directory(root)) is None
    assert not leases.is_locked(cache_key(step, root))
    run()
    assert seen == [False, True]
    assert "raw x runs: an earlier run of this step did not finish: it continues" in caplog.messages


def test_wrong_missing_and_damaged_inputs_are_refused(root: str):
    first, second = steps()
    artifact = flow(name="one")(lambda: raw(first, root, []))()
    run = flow(name="two")(lambda inputs: tokens(second, root, inputs))
    with pytest.raises(
        ValueError, match=rf"the inputs of tokens x must be \[raw/x {first.fingerprint[:16]}\], in this order, but are \[\]"
    ):
        run([])
    (first.directory(root) / "text.txt").write_text("alphb")
    with pytest.raises(ArtifactDamaged, match=r"text\.txt has other contents"):
        run([artifact])
    assert runs(root) == ["raw"]


def test_the_step_reaches_the_body_as_it_is(root: str):
    seen: list[Step] = []

    def keep_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, int]:
        seen.append(step)
        assert_still_owner()
        return {}

    step = steps()[0]
    flow(name="same")(lambda: step_task(description="keep")(keep_body).submit(step, root, []).result())()
    assert seen[0] is step


def test_a_body_that_lost_its_lease_commits_nothing(root: str):
    step = steps()[0]

    def robbed_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, int]:
        (directory / "text.txt").write_text("late")
        from tasks import lease_store

        key = cache_key(step, root)
        assert lease_store.grant(key, "thief", lease_store.newest(key), thread=0)
        with pytest.raises(LeaseLost):
            assert_still_owner()
        return {}

    with pytest.raises(LeaseLost, match="will not commit"):
        flow(name="robbed")(lambda: step_task(description="robbed")(robbed_body)(step, root, []))()
    assert read_manifest(step.directory(root)) is None


def test_a_full_disk_in_the_body_is_told_with_its_remedy(root: str):
    def full_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, int]:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="Free some space"):
        flow(name="full")(lambda: step_task(description="full")(full_body)(steps()[0], root, []))()


def test_outside_of_its_task_a_step_does_not_run(root: str):
    with pytest.raises(RuntimeError, match="without its lease"):
        run_step(lambda step, directory, inputs: {}, steps()[0], root, [])


def test_two_runs_at_once_do_the_work_once(root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECONDS", "1")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(two_steps, [root, f"{root}/../root"])
    assert first == second
    assert runs(root) == ["raw", "tokens"]


def test_a_killed_process_is_replaced_at_once_by_the_one_that_waits_for_it(root: str, server: str):
    victim = start(root, server)
    read_until(victim, "raw x runs: first run of this step")
    waiter = start(root, server)
    read_until(waiter, f":{victim.pid}, which has been running this step since")
    assert read_manifest(steps()[0].directory(root)) is None
    victim.kill()
    victim.communicate()
    output, log = waiter.communicate(timeout=120)
    assert output.strip() == str(steps()[1].directory(root)), log
    assert "which no longer runs" in log
    assert "an earlier run of this step did not finish: it continues" in log
    assert runs(root) == ["raw", "raw", "tokens"]
    assert sorted(path.parent.name for path in Path(root).rglob(".leases")) == ["raw", "tokens"]


def test_planted_records_and_edited_manifests_execute_nothing(root: str, tmp_path: Path):
    state = two_steps(root, return_state=True)
    step = steps()[0]
    directory, canary = step.directory(root), tmp_path / "canary"
    planted = pickle_record(canary)
    Path(f"{directory}@{step.fingerprint}").write_bytes(planted)
    (directory / "manifest.json").write_bytes(planted)
    two_steps(root)
    assert runs(root) == ["raw", "tokens", "raw"]
    manifest = json.loads((directory / "manifest.json").read_text())
    for extra in (
        {"serializer": {"type": "pickle"}},
        {"metadata": json.loads(planted)["metadata"], "result": json.loads(planted)["result"]},
    ):
        (directory / "manifest.json").write_text(json.dumps({**manifest, **extra}))
        two_steps(root)
    assert runs(root) == ["raw", "tokens", "raw", "raw", "raw"]
    with get_client(sync_client=True) as client:
        filters = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        for run in client.read_task_runs(flow_run_filter=filters):
            assert run.state is not None
            with pytest.raises(ValueError, match="does not exist"):
                run.state.result(retry_result_failure=False)
    assert not canary.exists()


def test_a_step_task_can_be_sent_to_another_process():
    copied = cloudpickle.loads(cloudpickle.dumps(tokens))
    assert (copied.name, copied.result_storage) == ("tokens", RECORDS)


def test_options_can_be_changed_without_losing_the_storage():
    changed = tokens.with_options(retries=3, tags=["x"]).with_options(name="other")
    assert (changed.retries, changed.name, changed.tags) == (3, "other", {"x"})
    assert changed.result_storage is RECORDS
    assert isinstance(changed.cache_policy, CachePolicy)
    assert changed.cache_policy.lock_manager is leases
    assert isinstance(changed.forced(), StepTask)
    assert changed.forced().refresh_cache is True
    assert (tokens.name, tokens.description, tokens.tags) == ("tokens", "Write it in capitals", {"data"})
