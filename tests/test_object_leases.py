"""Leases in buckets, against a real server, between real processes that are killed, stopped and raced against each other."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Iterator

import pytest

from tasks import objects
from tasks.lease_store import Lease
from tasks.leases import LeaseLockManager, LeaseLost, store_of
from tasks.object_leases import beat, give_back, grant, lease_object, newest, restore
from tasks.storage import StorageError
from tests.object_store import BUCKET, faulty_proxy, object_store, one_in_five, use_store
from tests.test_leases_processes import EXPIRY, POLL, manager, start_holder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture(autouse=True)
def emulator(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, server)


@pytest.fixture(autouse=True)
def no_heartbeat_outlives_its_test(emulator: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    managers: list[LeaseLockManager] = []
    initialize = LeaseLockManager.__init__
    monkeypatch.setattr(
        LeaseLockManager, "__init__", lambda self, *rest, **options: managers.append(self) or initialize(self, *rest, **options)
    )
    yield
    for held in (held for made in managers for held in made._held.values()):
        held.stop.set()


@pytest.fixture
def key() -> str:
    return f"artifact:gs://{BUCKET}/{uuid.uuid4().hex}/tokens/c4.en-0123456789abcdef@{'0' * 64}"


@pytest.fixture
def told() -> list[str]:
    return []


def granted(key: str) -> Lease:
    lease = grant(key, "a", newest(key), thread=0)
    assert lease is not None
    return lease


def test_a_lease_is_one_object_beside_the_artifact(key: str):
    assert lease_object(key).parent.key.endswith("/tokens/.leases")
    assert lease_object(key) != lease_object(key.replace("c4.en", "c4.de"))
    assert newest(key) is None
    lease = granted(key)
    assert newest(key) == lease
    assert list(objects.below(lease_object(key).parent)) == [lease_object(key).name]


def test_a_heartbeat_changes_the_generation_and_nothing_else(key: str):
    lease = granted(key)
    beat(lease)
    after = newest(key)
    assert after == lease
    assert after.heartbeat > lease.heartbeat


def test_a_number_is_granted_once_and_never_again(key: str):
    first = granted(key)
    assert grant(key, "late", None, thread=0) is None
    give_back(first)
    released = newest(key)
    assert released is not None
    assert (released.released, released.token) == (True, 1)
    second = grant(key, "b", released, thread=0)
    assert second is not None
    assert second.token == 2
    assert grant(key, "c", released, thread=0) is None
    for old in (beat, give_back, restore):
        old(first)
    assert newest(key) == second


def test_a_holder_that_shows_it_lives_in_the_last_moment_keeps_its_lease(key: str):
    lease = granted(key)
    seen = newest(key)
    beat(lease)
    assert grant(key, "b", seen, thread=0) is None
    assert newest(key) == lease


def test_a_damaged_lease_is_freed_by_silence_alone(key: str):
    objects.write(lease_object(key), b'{"token": 5, "ho', generation=0)
    started = time.monotonic()
    assert not manager().acquire_lock(key, "me", acquire_timeout=0)
    assert manager().acquire_lock(key, "me", acquire_timeout=20)
    assert time.monotonic() - started >= EXPIRY


def test_a_lease_that_was_deleted_is_written_again_by_its_holder(key: str):
    locks = manager()
    assert locks.acquire_lock(key, "me")
    before = newest(key)
    objects.delete(lease_object(key))
    locks.assert_held(key, "me")
    assert newest(key) == before
    locks.release_lock(key, "me")


def test_threads_that_take_a_fresh_lease_at_once_get_it_one_after_the_other(key: str):
    inside, most, tokens = [0], [0], list[int]()

    def work(number: int) -> None:
        locks = LeaseLockManager(30, 90, 0.01)
        assert locks.acquire_lock(key, str(number), acquire_timeout=60)
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        lease = newest(key)
        assert lease is not None
        tokens.append(lease.token)
        inside[0] -= 1
        locks.release_lock(key, str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], sorted(tokens)) == (1, [1, 2, 3, 4, 5])


def test_of_two_processes_one_works_and_the_other_waits(key: str, told: list[str]):
    process = start_holder(key)
    locks = manager(tell=lambda level, message: told.append(message))
    assert not locks.acquire_lock(key, "me", acquire_timeout=1.5 * EXPIRY)
    assert len(told) == 1
    assert f":{process.pid}, which has been running this step since 2" in told[0]
    assert process.communicate("\n")[0] == "still owner\n"
    assert locks.acquire_lock(key, "me", acquire_timeout=20)


def test_a_killed_holder_is_replaced(key: str, told: list[str]):
    process = start_holder(key)
    process.kill()
    process.wait()
    assert LeaseLockManager(30, 90, POLL, lambda level, message: told.append(message)).acquire_lock(key, "me", acquire_timeout=0)
    assert "which no longer runs" in told[-1]


def test_a_killed_holder_of_another_machine_is_replaced_after_its_silence(key: str, told: list[str], monkeypatch: pytest.MonkeyPatch):
    process = start_holder(key)
    process.kill()
    process.wait()
    monkeypatch.setattr("tasks.lease_store._machine", lambda: ("elsewhere", "", ""))
    locks = manager(tell=lambda level, message: told.append(message))
    assert not locks.acquire_lock(key, "me", acquire_timeout=0)
    assert locks.acquire_lock(key, "me", acquire_timeout=20)
    assert "which has not been heard of for" in told[-1]


def test_a_stopped_holder_is_replaced_after_expiry_and_cannot_commit(key: str):
    process = start_holder(key)
    process.send_signal(signal.SIGSTOP)
    locks = manager()
    assert not locks.acquire_lock(key, "me", acquire_timeout=0)
    assert locks.acquire_lock(key, "me", acquire_timeout=20)
    process.send_signal(signal.SIGCONT)
    assert process.communicate("\n")[0].startswith("lost: lost the lease on gs://")
    locks.assert_held(key, "me")


@pytest.mark.parametrize("shift", [-600.0, 600.0])
def test_clocks_that_are_ten_minutes_apart_do_not_steal_a_live_lease(key: str, shift: float):
    process = start_holder(key, shift=shift)
    assert not manager().acquire_lock(key, "me", acquire_timeout=2 * EXPIRY)
    assert process.communicate("\n")[0] == "still owner\n"
    process.wait()


def test_without_permission_there_is_no_lease_but_what_is_committed_can_be_read(server: str, key: str, told: list[str], monkeypatch):
    with faulty_proxy(server, lambda method, path: 403 if method == "POST" else None) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        locks = manager(tell=lambda level, message: told.append(message))
        assert locks.acquire_lock(key, "me", acquire_timeout=0)
        with pytest.raises(LeaseLost):
            locks.assert_held(key)
    assert "no lease on gs://" in told[0]
    assert "grant roles/storage.objectUser" in told[0]


def test_a_missing_bucket_is_an_error():
    key = f"artifact:gs://no-such-bucket/tokens/x-0123456789abcdef@{'0' * 64}"
    with pytest.raises(StorageError, match="there is no bucket gs://no-such-bucket"):
        manager().acquire_lock(key, "me", acquire_timeout=0)


def test_with_one_fault_in_five_tokens_rise_by_one_and_nobody_overlaps(server: str, key: str, monkeypatch: pytest.MonkeyPatch):
    with faulty_proxy(server, one_in_five(seed=2)) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        locks = LeaseLockManager(30, 90, 0.01)
        for number in range(1, 16):
            assert locks.acquire_lock(key, f"holder {number}", acquire_timeout=60)
            lease = store_of(key).newest(key)
            assert lease is not None
            assert (lease.token, lease.holder) == (number, f"holder {number}")
            locks.assert_held(key)
            locks.release_lock(key, f"holder {number}")
    assert proxy.seen["lost"] >= 3, proxy.seen
