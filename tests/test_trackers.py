"""Trackers that hang, fail, lag or are killed: the run goes on, and each has every step in the end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from model import trackers
from model.deliveries import Deliveries
from model.metrics import MetricsLog, read_json_lines
from model.secret_text import without_secrets
from model.tracker_services import Session
from tests.tracker_files import tensorboard_points, trackio_rows, wandb_rows

CHECKOUT = Path(__file__).resolve().parent.parent
ALL: tuple[trackers.TrackerName, ...] = ("wandb", "tensorboard", "trackio")


@pytest.fixture(scope="module")
def trackio_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackio")  # one for all tests: trackio reads the variable when it is imported


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, trackio_directory: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(trackio_directory))


class Fake:
    """A service that keeps what it gets, and does to each call what it is told: nothing, raise, or wait for `free`."""

    def __init__(self, **does: str) -> None:
        self.does, self.free, self.reached = does, threading.Event(), threading.Event()
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.first_step = self.flushed = 0
        self.settle_seconds = 0.0

    def __call__(self, session: Session) -> Fake:
        self.first_step = session.first_step
        self._act("open")
        return self

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._act("log")
        self.rows.append((step, metrics))

    def flush(self) -> None:
        self._act("flush")
        self.flushed += 1

    def close(self) -> None:
        self._act("close")

    def _act(self, method: str) -> None:
        does = self.does.get(method)
        if does is not None and does.startswith("wait"):
            self.reached.set()
            self.free.wait()
        if does not in (None, "wait"):
            raise ConnectionError(does)


def thread_of(fake: Fake, directory: Path, said: list[str], capacity: int = trackers.CAPACITY) -> trackers.TrackerThread:
    session = Session(directory=directory, run_id="0" * 16, name="run", tags=(), config={}, tell=said.append)
    return trackers.TrackerThread("fake", fake, session, Deliveries(directory / "trackers.json", said.append), capacity=capacity)


def logged(directory: Path, fake: Fake, steps: range, said: list[str], **options: Any) -> MetricsLog:
    log = MetricsLog(directory / "metrics.jsonl", steps[0] - 1, [thread_of(fake, directory, said, **options)])
    for step in steps:
        log.log(step, {"train/loss": 1.0 / step})
    log.flush()
    return log


@pytest.mark.parametrize("method", ["open", "log", "close"])
def test_one_that_blocks_for_ever_delays_nothing(tmp_path: Path, method: str) -> None:
    fake, said = Fake(**{method: "wait"}), list[str]()
    log = logged(tmp_path, fake, range(1, 51), said)
    if method == "close":
        assert log.close(0.2) is False  # the thread is in close() by then, or still on its way there
    else:
        assert fake.reached.wait(30)
        assert log.close(0.0) is False
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 50
    (message,) = said
    assert "fake does not finish, so it is given up: rows after step" in message
    fake.free.set()


@pytest.mark.parametrize("then", ["wait", "wait, then fail"])
def test_one_that_was_given_up_says_and_notes_nothing_more(tmp_path: Path, then: str) -> None:
    fake, said = Fake(log=then), list[str]()
    log = logged(tmp_path, fake, range(1, 3), said)
    assert fake.reached.wait(30)
    assert log.close(0.0) is False
    fake.free.set()
    thread: Any = log._trackers[0]
    thread._thread.join(30)
    assert not thread._thread.is_alive()
    assert len(said) == 1
    assert len(fake.rows) == (1 if then == "wait" else 0)
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize(("method", "how"), [("open", "did not start"), ("log", "stopped working"), ("close", "stopped working")])
def test_one_that_raises_is_one_message_without_secrets(tmp_path: Path, method: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    fake, said = Fake(**{method: "no answer to 0123456789secret from https://me:word@host"}), list[str]()
    log = logged(tmp_path, fake, range(1, 4), said)
    assert log.close() is True
    assert said == [f"fake {how} (no answer to [hidden] from https://[hidden]@host): metrics go on to metrics.jsonl"]
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 3
    tracker: Any = log._trackers[0]
    tracker.log(4, {})
    assert not tracker._queue  # nobody would take it out
    assert Deliveries(tmp_path / "trackers.json", said.append).step("fake") == 0


def test_a_full_queue_drops_the_oldest_with_one_message_and_the_next_attempt_sends_them(tmp_path: Path) -> None:
    slow, said = Fake(log="wait"), list[str]()
    log = logged(tmp_path, slow, range(1, 2), said, capacity=3)
    assert slow.reached.wait(30)  # row 1 has left the queue
    for step in range(2, 10):
        log.log(step, {"train/loss": 1.0})
    log.flush()
    slow.free.set()
    assert log.close() is True
    assert [step for step, _ in slow.rows] == [1, 7, 8, 9]
    assert said == ["fake is 3 rows behind, so it loses the oldest: metrics.jsonl has them all"]
    again = Fake()
    logged(tmp_path, again, range(10, 11), said).close()
    assert [step for step, _ in again.rows] == list(range(1, 11))


def test_what_has_settled_is_noted_at_a_sync_and_the_rest_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now)
    fake, said = Fake(), list[str]()
    fake.settle_seconds = 30.0
    thread = thread_of(fake, tmp_path, said)
    thread.begin([], 0)
    for step, now in ((1, 100.0), (2, 131.0)):  # noqa: B007
        thread.log(step, {})
        while len(fake.rows) < step:
            time.sleep(0.001)
        thread.sync()
        while fake.flushed < step:
            time.sleep(0.001)
    thread.sync()  # at the same time: row 2 has not settled
    while fake.flushed < 3:
        time.sleep(0.001)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"fake": {"rows": 0, "step": 1}}

    again = Fake()
    second = thread_of(again, tmp_path, said)
    second.begin([{"step": 1, "a": 1.0}, {"step": 2, "a": "nan"}, {"step": 3, "a": "-inf"}], 3)
    assert trackers.close_trackers([second])
    assert again.first_step == 2
    assert [step for step, _ in again.rows] == [2, 3]
    assert str([metrics["a"] for _, metrics in again.rows]) == "[nan, -inf]"  # numbers, no text
    assert Deliveries(tmp_path / "trackers.json", said.append).step("fake") == 3
    assert said == []


def test_a_resume_before_what_was_delivered_begins_there(tmp_path: Path) -> None:
    said = list[str]()
    logged(tmp_path, Fake(), range(1, 9), said).close()
    again = Fake()
    logged(tmp_path, again, range(4, 6), said).close()
    assert again.first_step == 4
    assert [step for step, _ in again.rows] == [4, 5]


def test_row_numbers_are_never_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "trackers.json"
    first = Deliveries(path, pytest.fail)
    assert [first.reserve_rows("wandb", 0), first.reserve_rows("wandb", 0)] == [0, 1000]
    assert Deliveries(path, pytest.fail).reserve_rows("wandb", 0) == 2000
    assert Deliveries(path, pytest.fail).reserve_rows("wandb", 7777) == 7777


def test_a_damaged_record_is_told_and_everything_sent_again(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text('{"fake": 3}')
    fake, said = Fake(), list[str]()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    logged(tmp_path, fake, range(2, 3), said).close()
    assert [step for step, _ in fake.rows] == [1, 2]
    assert said == [f"{tmp_path / 'trackers.json'} cannot be read, so the trackers are sent every row again"]


def test_secrets_in_addresses_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "a")
    assert without_secrets("a hf_abcdefgh at http://h/?write_token=xyz&n=1") == "a [hidden] at http://h/?write_token=[hidden]&n=1"


def attempt(directory: Path, first: int, last: int, unsure: int, *names: str) -> None:
    command = [sys.executable, "-m", "tests.tracker_run", str(directory), str(first), str(last), str(unsure), *names]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == (-signal.SIGKILL if unsure else 0), done.stdout + done.stderr


def test_after_kills_and_resumes_every_tracker_has_every_step(tmp_path: Path, trackio_directory: Path) -> None:
    pytest.importorskip("tensorboardX", reason="in the extra [track]")
    pytest.importorskip("trackio", reason="in the extra [track]")
    run = tmp_path / "run"
    run.mkdir()
    attempt(run, 1, 10, 5, *ALL)  # noted up to 10, killed after 15
    attempt(run, 13, 20, 3, *ALL)  # goes on after 12: 11 and 12 were perhaps never delivered
    attempt(run, 8, 30, 0, *ALL)  # goes on after 7, before what was noted
    steps = list(range(1, 31))

    rows = wandb_rows(run)
    assert {row["step"] for row in rows} == set(steps)
    assert [row["step"] for row in rows][-23:] == list(range(8, 31))
    numbers = [row["_step"] for row in rows]
    assert all(before < after for before, after in itertools.pairwise(numbers))  # else W&B drops the row
    assert {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")} == {"0123456789abcdef"}

    points = tensorboard_points(run / "tensorboard")
    assert {key: [step for step, _ in of] for key, of in points.items()} == {"train/loss": steps, "not/finite": steps}
    assert [value for _, value in points["train/loss"]] == [float(step) for step in steps]

    assert {row["step"] for row in trackio_rows(trackio_directory, "run-01234567")} == set(steps)


def test_all_trackers_get_the_same_keys(tmp_path: Path, trackio_directory: Path) -> None:
    pytest.importorskip("tensorboardX", reason="in the extra [track]")
    pytest.importorskip("trackio", reason="in the extra [track]")
    fake, said = Fake(), list[str]()
    opened = trackers.open_trackers(ALL, tmp_path, run_id="f" * 16, name="run", tags=("a",), config={"x": 1}, tell=said.append)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, [*opened, thread_of(fake, tmp_path, said)])
    log.log(1, {"train/loss": 2.5, "grad/norm/layers/wq/0": float("inf"), "eval/web-1.0/bpb": 1.0, "throughput/total_tokens": 7})
    assert log.close() is True
    assert said == []
    ((_, metrics),) = fake.rows
    (in_wandb,) = wandb_rows(tmp_path)
    (in_trackio,) = trackio_rows(trackio_directory, "run-ffffffff")
    assert metrics.keys() == {"train/loss", "grad/norm/layers/wq/0", "eval/web-1.0/bpb", "throughput/total_tokens"}
    assert metrics.keys() == tensorboard_points(tmp_path / "tensorboard").keys()
    assert metrics.keys() == in_trackio.keys() - {"step"}
    assert metrics.keys() == {key for key in in_wandb if not key.startswith("_")} - {"step"}


def test_a_missing_package_is_refused_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "trackio", "no_such_package")
    with pytest.raises(ValueError, match=r"track='trackio' needs the package 'no_such_package'.*prefect-llama\[track\]"):
        trackers.check_trackers(("trackio",))


def test_where_the_run_went_back_nothing_after_it_counts_as_delivered(tmp_path: Path) -> None:
    said: list[str] = []
    deliveries = Deliveries(tmp_path / "trackers.json", said.append)
    deliveries.note("fake", 12)
    tracker = thread_of(Fake(), tmp_path, said)
    tracker.begin([{"step": step} for step in range(1, 5)], resume_step=4)
    assert Deliveries(tmp_path / "trackers.json", said.append).step("fake") == 4  # a kill from here on sends 5 and more again
    tracker.end()
    assert tracker.wait(time.monotonic() + 30)
