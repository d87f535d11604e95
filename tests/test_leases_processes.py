"""Leases between real processes that are killed, stopped and raced against each other."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.lease_store import lease_directory
from tasks.leases import LeaseLockManager

HEARTBEAT, EXPIRY, POLL = 0.1, 1.0, 0.05

HOLDER = f"""
import sys, time
from tasks.leases import LeaseLockManager, LeaseLost
key, task = sys.argv[1:3]
manager = LeaseLockManager({HEARTBEAT}, {EXPIRY}, {POLL})
manager.acquire_lock(key, "child")
print("held", manager._held[key].lease.token, flush=True)
if task == "once":
    time.sleep(0.2)
    manager.release_lock(key, "child")
    sys.exit()
sys.stdin.readline()
try:
    manager.assert_held(key)
    print("still owner", flush=True)
except LeaseLost as error:
    print("lost:", error, flush=True)
"""

# The same on a machine whose clock is wrong: in what it writes, and in nothing that anyone compares.
WRONG_CLOCK = """
import time
real_time, real_strftime = time.time, time.strftime
time.time = lambda: real_time() + {shift}
time.strftime = lambda form: real_strftime(form, time.localtime(time.time()))
"""


def manager(**options) -> LeaseLockManager:
    return LeaseLockManager(**{"heartbeat_seconds": HEARTBEAT, "expiry_seconds": EXPIRY, "poll_seconds": POLL, **options})


def start_holder(key: str, task: str = "hold", *, wait: bool = True, shift: float = 0.0) -> subprocess.Popen[str]:
    script = WRONG_CLOCK.format(shift=shift) + HOLDER
    process = subprocess.Popen([sys.executable, "-c", script, key, task], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if wait:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("held")
    return process


@pytest.fixture
def key(tmp_path: Path) -> str:
    return f"artifact:{tmp_path}/tokens/c4.en-0123456789abcdef@{'0' * 64}"


@pytest.fixture
def told() -> list[str]:
    return []


def test_a_killed_holder_is_replaced_at_once(key: str, told: list[str]):
    process = start_holder(key)
    process.kill()
    process.wait()
    locks = LeaseLockManager(30, 90, POLL, lambda level, message: told.append(message))
    assert not locks.is_locked(key)
    assert locks.acquire_lock(key, "me", acquire_timeout=0)
    assert [message for message in told if "taking over" in message and f":{process.pid}, which no longer runs" in message]


def test_a_killed_holder_that_nobody_reaped_is_dead_too(key: str):
    process = start_holder(key)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert LeaseLockManager(30, 90, POLL).acquire_lock(key, "me", acquire_timeout=0)
    process.wait()


def test_a_live_holder_is_waited_for_by_name(key: str, told: list[str]):
    process = start_holder(key)
    locks = manager(tell=lambda level, message: told.append(message))
    assert not locks.acquire_lock(key, "me", acquire_timeout=1.5 * EXPIRY)
    assert told == [message for message in told if message.startswith("waiting for ")]
    assert len(told) == 1
    assert f":{process.pid}, which has been running this step since 2" in told[0]
    assert not locks.wait_for_lock(key, timeout=0.1)
    process.communicate("\n")
    assert locks.acquire_lock(key, "me", acquire_timeout=0)


def test_a_stopped_holder_is_replaced_after_expiry_and_cannot_commit(key: str, told: list[str]):
    process = start_holder(key)
    process.send_signal(signal.SIGSTOP)
    locks = manager(tell=lambda level, message: told.append(message))
    assert not locks.acquire_lock(key, "me", acquire_timeout=0)
    assert locks.acquire_lock(key, "me", acquire_timeout=20)
    assert "which has not been heard of for" in told[-1]
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate("\n")
    assert output.startswith("lost: lost the lease on ")
    locks.assert_held(key, "me")


def test_a_holder_stopped_for_less_than_expiry_keeps_its_lease(key: str):
    process = start_holder(key)
    process.send_signal(signal.SIGSTOP)
    time.sleep(EXPIRY / 4)
    process.send_signal(signal.SIGCONT)
    assert not manager().acquire_lock(key, "me", acquire_timeout=1.5 * EXPIRY)
    assert process.communicate("\n")[0] == "still owner\n"


@pytest.mark.parametrize("shift", [-600.0, 600.0])
def test_clocks_that_are_ten_minutes_apart_do_not_steal_a_live_lease(key: str, shift: float):
    process = start_holder(key, shift=shift)
    assert not manager().acquire_lock(key, "me", acquire_timeout=2 * EXPIRY)
    assert process.communicate("\n")[0] == "still owner\n"


def test_of_many_waiters_for_a_killed_holder_exactly_one_wins(key: str):
    process = start_holder(key)
    waiters = [start_holder(key, "once", wait=False) for _ in range(4)]
    process.kill()
    process.wait()
    outputs = [waiter.communicate(timeout=60)[0] for waiter in waiters]
    assert sorted(outputs) == [f"held {token}\n" for token in (2, 3, 4, 5)]


def test_who_takes_the_lease_after_its_directory_was_lost_is_the_only_owner(key: str):
    process = start_holder(key)
    process.send_signal(signal.SIGSTOP)
    shutil.rmtree(lease_directory(key).parent)
    locks = manager()
    assert locks.acquire_lock(key, "me", acquire_timeout=0)
    process.send_signal(signal.SIGCONT)
    assert process.communicate("\n")[0].startswith("lost: ")
    locks.assert_held(key)
