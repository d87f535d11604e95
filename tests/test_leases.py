"""One process works on a step; a dead or silent holder is replaced, and a holder that was replaced cannot commit."""

import asyncio
import json
import os
import pickle
import shutil
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest

from tasks import lease_store
from tasks.lease_store import Lease, grant, lease_directory, newest
from tasks.leases import LeaseLockManager, LeaseLost
from tasks.storage import StorageError

HEARTBEAT, EXPIRY, POLL = 0.1, 1.0, 0.05


def manager(**options) -> LeaseLockManager:
    return LeaseLockManager(**{"heartbeat_seconds": HEARTBEAT, "expiry_seconds": EXPIRY, "poll_seconds": POLL, **options})


@pytest.fixture
def key(tmp_path: Path) -> str:
    return f"artifact:{tmp_path}/tokens/c4.en-0123456789abcdef@{'0' * 64}"


@pytest.fixture
def told() -> list[str]:
    return []


def test_it_is_a_prefect_lock_manager():
    from prefect.locking.protocol import LockManager

    assert isinstance(manager(), LockManager)


def test_acquire_is_exclusive_and_reentrant_for_its_holder(key: str):
    locks = manager()
    assert locks.acquire_lock(key, "a")
    assert locks.acquire_lock(key, "a")
    assert locks.is_locked(key)
    assert locks.is_lock_holder(key, "a")
    assert not locks.is_lock_holder(key, "b")
    in_other_thread: list[bool] = []
    thread = threading.Thread(target=lambda: in_other_thread.append(locks.acquire_lock(key, "b", acquire_timeout=0)))
    thread.start()
    thread.join()
    assert in_other_thread == [False]
    locks.release_lock(key, "b")
    assert locks.is_locked(key)
    locks.release_lock(key, "a")
    assert not locks.is_locked(key)
    assert locks.wait_for_lock(key, timeout=0)


def test_keys_that_differ_after_a_dot_do_not_share_a_lease(tmp_path: Path):
    locks = manager()
    assert locks.acquire_lock(f"artifact:{tmp_path}/tokens/c4.en@1", "a")
    assert locks.acquire_lock(f"artifact:{tmp_path}/tokens/c4.de@1", "b", acquire_timeout=0)
    assert lease_directory(f"artifact:{tmp_path}/tokens/c4.en@1").parent == tmp_path / "tokens" / ".leases"


def test_tokens_rise_and_are_never_used_again(key: str):
    locks = manager()
    tokens = []
    for holder in "abcdefghijkl":
        assert locks.acquire_lock(key, holder)
        current = newest(key)
        assert current is not None
        tokens.append(current.token)
        locks.release_lock(key, holder)
    assert tokens == list(range(1, 13))
    assert len(list(lease_directory(key).iterdir())) <= 9, "old leases are swept"


def test_threads_that_take_a_fresh_lease_at_once_get_it_one_after_the_other(key: str):
    locks = manager(poll_seconds=0.005)
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        assert locks.acquire_lock(key, f"holder {number}")
        inside.append(number)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(number)
        locks.release_lock(key, f"holder {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def foreign(key: str, **changes) -> Lease:
    """A lease held by a process on another machine."""
    lease = grant(key, "other", None, thread=0)
    assert lease is not None
    record = json.loads(lease.path.read_text())
    record["owner"] = {**record["owner"], "host": "elsewhere", "pid": 999_999_999, **changes}
    lease.path.write_text(json.dumps(record))
    return lease


@pytest.mark.parametrize("shift", [-600.0, 600.0])
def test_clocks_that_disagree_do_not_steal_a_live_lease(key: str, shift: float):
    lease = foreign(key)
    alive = threading.Event()

    def beat_with_shifted_clock() -> None:
        while not alive.wait(HEARTBEAT):
            os.utime(lease.path, (time.time() + shift, time.time() + shift))

    thread = threading.Thread(target=beat_with_shifted_clock)
    thread.start()
    try:
        assert not manager().acquire_lock(key, "me", acquire_timeout=1.5 * EXPIRY)
    finally:
        alive.set()
        thread.join()
    assert manager().acquire_lock(key, "me", acquire_timeout=20)


def test_a_waiter_that_was_suspended_does_not_count_the_time_it_did_not_look(key: str, monkeypatch: pytest.MonkeyPatch):
    foreign(key)
    now = iter(float(1000 * look) for look in range(1_000_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    looks: list[Lease | None] = []
    real = lease_store.newest
    monkeypatch.setattr("tasks.lease_store.newest", lambda key: looks.append(real(key)) or looks[-1])
    assert manager().acquire_lock(key, "me")
    assert len(looks) >= EXPIRY / (2 * POLL)


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"owner": 1}'])
def test_a_lease_damaged_by_a_power_cut_is_freed_by_silence_alone(key: str, damage: bytes):
    lease = grant(key, "other", None, thread=0)
    assert lease is not None
    lease.path.write_bytes(damage)
    locks = manager()
    assert locks.is_locked(key)
    assert not locks.acquire_lock(key, "me", acquire_timeout=0)
    assert locks.acquire_lock(key, "me", acquire_timeout=20)


def test_a_holder_survives_the_loss_of_the_lease_directory(key: str):
    locks = manager(heartbeat_seconds=0.5)
    locks.acquire_lock(key, "me")
    shutil.rmtree(lease_directory(key).parent)
    locks.assert_held(key)
    assert locks.is_lock_holder(key, "me")
    shutil.rmtree(lease_directory(key).parent)
    assert not locks.is_locked(key)
    locks.release_lock(key, "me")
    assert locks.acquire_lock(key, "you", acquire_timeout=0)


def test_a_lease_left_behind_by_the_same_thread_does_not_block_it(key: str, told: list[str]):
    locks = manager(tell=lambda level, message: told.append(message))
    locks.acquire_lock(key, "first")
    assert locks.acquire_lock(key, "second", acquire_timeout=0)
    assert "which left it behind" in told[-1]
    with pytest.raises(LeaseLost):
        locks.assert_held(key, "first")
    locks.release_lock(key, "first")
    locks.assert_held(key, "second")


def test_a_lease_left_behind_by_an_ended_thread_expires(key: str):
    locks = manager()
    thread = threading.Thread(target=locks.acquire_lock, args=(key, "ended"))
    thread.start()
    thread.join()
    assert locks.acquire_lock(key, "me", acquire_timeout=20)


def test_a_lease_taken_for_a_limited_time_expires(key: str):
    process_lock = manager()
    asyncio.run(process_lock.aacquire_lock(key, "first", hold_timeout=0.2))
    assert not manager().acquire_lock(key, "second", acquire_timeout=0)
    assert manager().acquire_lock(key, "second", acquire_timeout=20)


def test_the_asynchronous_methods_wait_without_blocking_and_without_stealing(key: str):
    locks = manager()

    async def contend() -> list[object]:
        first = await locks.aacquire_lock(key, "a")
        second = await locks.aacquire_lock(key, "b", acquire_timeout=0.2)
        free = await locks.await_for_lock(key, timeout=0.1)
        locks.release_lock(key, "a")
        return [first, second, free, await locks.await_for_lock(key, timeout=1), await locks.aacquire_lock(key, "b", acquire_timeout=1)]

    assert asyncio.run(contend()) == [True, False, False, True, True]


def test_a_pickled_manager_has_its_settings_and_holds_nothing_and_a_deep_copy_is_itself(key: str):
    locks = manager()
    locks.acquire_lock(key, "me")
    other = pickle.loads(pickle.dumps(locks))
    assert other._arguments == locks._arguments
    with pytest.raises(LeaseLost):
        other.assert_held(key)
    assert deepcopy(locks) is locks


def test_in_a_read_only_place_there_is_no_lease_but_what_is_committed_can_be_read(
    key: str, told: list[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_, **__):
        raise StorageError(30, "read-only")

    monkeypatch.setattr("tasks.lease_store.grant", refuse)
    locks = manager(tell=lambda level, message: told.append(message))
    assert locks.acquire_lock(key, "me")
    assert "can only be reused" in told[0]
    with pytest.raises(LeaseLost):
        locks.assert_held(key)
    locks.release_lock(key, "me")


def test_a_full_disk_is_an_error(key: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise StorageError(28, "full")

    monkeypatch.setattr("tasks.lease_store.grant", refuse)
    with pytest.raises(StorageError, match="full"):
        manager().acquire_lock(key, "me")


def test_wrong_times_are_refused():
    with pytest.raises(ValueError, match=r"heartbeat_seconds=90 must be above 0 and below expiry_seconds=30"):
        LeaseLockManager(90, 30)
