"""The main job with its artifacts in a bucket: on this machine and on a slice whose hosts share nothing but the bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.metrics import read_json_lines
from tasks import objects
from tasks.places import ObjectPath, place_of
from tests.main_job import MainJob, assert_same_outcome
from tests.object_store import BUCKET, FaultyProxy, faulty_proxy, object_store, one_in_five, use_store
from tests.prefect_server import Prefect, prefect_server
from tests.tpu_pool import Slices, on_pool, state_names, until, work_pools

pytestmark = pytest.mark.slow

# Long enough for something to happen in the middle; a checkpoint about every two seconds.
STEPS = 200
LONG = (
    *("--train.num-train-steps", str(STEPS), "--train.steps-per-export", "20", "--train.steps-per-eval", "100"),
    *("--train.steps-per-sample", "100"),
)


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    """A bucket's server, which answers well until it is told otherwise."""
    with object_store() as url, faulty_proxy(url, lambda method, path: None) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def store(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, proxy.url)


@pytest.fixture(scope="module")
def prefect(proxy: FaultyProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home, env={"STORAGE_EMULATOR_HOST": proxy.url})) as prefect:
        prefect.start("worker", "start", "--pool", "tpu", "--name", "first")
        yield prefect


@pytest.fixture(scope="module")
def undisturbed(prefect: Prefect, tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    """The run on the same slice with its artifacts in a directory."""
    place = tmp_path_factory.mktemp("undisturbed")
    job = on_pool(prefect, place / "root", place, *LONG)
    job.succeed()
    return job


def in_bucket(prefect: Prefect, logs: Path, proxy: FaultyProxy) -> tuple[MainJob, ObjectPath]:
    """The run on a slice, with a cache of this machine that is empty."""
    place = f"gs://{BUCKET}/{logs.name}"
    variables = {"STORAGE_EMULATOR_HOST": proxy.url, "PREFECT_LLAMA_CACHE": str(logs / "cache")}
    job = on_pool(prefect, logs / "root", logs, *LONG, place=place, **variables)
    return job, ObjectPath.parse(place)


def brought(place: ObjectPath, directory: Path) -> Path:
    """Everything below `place` as files, as another person copies it."""
    for name, stored in objects.below(place).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        objects.download(stored, directory / name)
    return directory


def newest_checkpoint(place: ObjectPath) -> int:
    names = [stored.path.key for stored in objects.below(place / "checkpoints").values()]
    return max([int(key.split("/")[-2]) for key in names if key.endswith("/commit_success.txt") and key.split("/")[-2].isdigit()] or [0])


def test_a_slice_that_shares_only_the_bucket_is_preempted_and_ends_bit_equal(
    prefect: Prefect, proxy: FaultyProxy, undisturbed: MainJob, tmp_path: Path
) -> None:
    job, place = in_bucket(prefect, tmp_path, proxy)
    slices = Slices(prefect.home)
    until(lambda: newest_checkpoint(place) >= 60 or job.process.poll() is not None, "a checkpoint in the bucket")
    slices.order("preempt", name=slices.one(), grace=0)
    job.succeed()
    names = state_names(prefect, prefect.flow_runs("pretrain")[-1])
    assert "Preempted" in names
    assert names[-1] == "Completed"
    copy = brought(place, tmp_path / "copy")
    assert_same_outcome(copy, undisturbed.root)
    slices.gone()
    again = MainJob(tmp_path / "root", tmp_path / "home", "--pool", "tpu", *LONG, "--plan", place=str(place))
    assert again.succeed().count("reuse") >= 8


def test_one_request_in_five_fails_and_the_digests_are_the_same(
    prefect: Prefect, proxy: FaultyProxy, undisturbed: MainJob, tmp_path: Path
) -> None:
    proxy.seen.clear()
    proxy.fault, well = one_in_five(seed=7), proxy.fault
    try:
        job, place = in_bucket(prefect, tmp_path, proxy)
        assert job.status(900) == 0, job.output  # each fault waits a second at least
    finally:
        proxy.fault = well
    faults = sum(proxy.seen[kind] for kind in (503, 429, "reset", "lost"))
    assert faults > proxy.seen["requests"] / 8 > 50
    print(f"{proxy.seen}")
    assert_same_outcome(brought(place, tmp_path / "copy"), undisturbed.root)


def test_stopped_here_and_continued_on_another_machine(proxy: FaultyProxy, tmp_path: Path) -> None:
    root, place = tmp_path / "root", f"gs://{BUCKET}/{tmp_path.name}"

    def run(machine: str) -> MainJob:
        variables = {"STORAGE_EMULATOR_HOST": proxy.url, "PREFECT_LLAMA_CACHE": str(tmp_path / machine)}
        return MainJob(root, tmp_path / f"{machine}-home", *LONG, place=place, **variables)

    first = run("first")
    until(lambda: newest_checkpoint(ObjectPath.parse(place)) >= 40 or first.process.poll() is not None, "a checkpoint")
    first.kill(tree=True)
    second = run("second")
    assert "is restored from the checkpoint of step" in second.succeed()
    whole = MainJob(tmp_path / "whole", tmp_path / "whole-home", *LONG)
    whole.succeed()
    copy = brought(ObjectPath.parse(place), tmp_path / "copy")
    assert_same_outcome(copy, tmp_path / "whole")
    (metrics,) = (copy / "checkpoints").glob("job-*/metrics.jsonl")
    assert [row["step"] for row in read_json_lines(metrics)] == list(range(1, STEPS + 1))
    assert isinstance(place_of(place), ObjectPath)
