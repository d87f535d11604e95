"""Leases on disk: each number is granted once, and only a process that is certainly gone is taken for dead."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.lease_store import Lease, Owner, beat, directory_of, give_back, grant, lease_directory, newest, restore


@pytest.fixture
def key(tmp_path: Path) -> str:
    return f"artifact:{tmp_path}/tokens/c4.en-0123456789abcdef@{'0' * 64}"


def granted(key: str) -> Lease:
    lease = grant(key, "a", newest(key), thread=0)
    assert lease is not None
    return lease


def test_leases_lie_beside_the_artifact(key: str, tmp_path: Path):
    assert directory_of(key) == tmp_path / "tokens" / "c4.en-0123456789abcdef"
    assert lease_directory(key).parent == tmp_path / "tokens" / ".leases"
    assert lease_directory(key) != lease_directory(key.replace("c4.en", "c4.de"))


def test_a_late_comer_cannot_be_granted_a_number_that_was_passed(key: str):
    first = grant(key, "a", None, thread=0)
    second = grant(key, "b", first, thread=0)
    assert second is not None
    assert grant(key, "c", first, thread=0) is None
    second.path.with_name(f"{1:020d}.json").unlink()
    assert grant(key, "d", None, thread=0) is None
    assert newest(key) == second


def test_no_lease_without_a_directory(key: str):
    assert newest(key) is None


def test_a_lease_reads_back_and_its_heartbeat_changes_nothing_else(key: str):
    lease = granted(key)
    before = newest(key)
    beat(lease)
    after = newest(key)
    assert before is not None
    assert after is not None
    assert lease == before == after
    assert after.heartbeat > before.heartbeat


def test_a_lease_given_back_is_free_and_its_number_stays_used(key: str):
    first = granted(key)
    assert not first.is_free()
    give_back(first)
    free = newest(key)
    assert free == replace(first, released=True)
    assert free.is_free()
    assert granted(key).token == first.token + 1


def test_restore_writes_a_lost_lease_and_never_over_another(key: str):
    first = granted(key)
    first.path.unlink()
    restore(first)
    assert newest(key) == first
    first.path.unlink()
    other = grant(key, "b", None, thread=0)
    restore(first)
    assert newest(key) == other


def test_no_half_written_lease_is_ever_seen(key: str):
    """Readers race with 200 grants; each lease that they see is complete."""
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            lease = newest(key)
            seen.append(lease is None or lease.owner is not None)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        granted(key)
    stop.set()
    reader.join()
    assert all(seen)


def test_this_process_is_alive_and_an_ended_one_is_dead():
    here = Owner.current(0)
    assert not here.is_dead()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        code = "import sys; from tasks.lease_store import _process_start; print(_process_start(int(sys.argv[1])))"
        started = subprocess.run([sys.executable, "-c", code, str(process.pid)], capture_output=True, text=True, check=True).stdout.strip()
        other = replace(here, pid=process.pid, started=started)
        assert not other.is_dead()
        process.communicate(b"\n")
    assert other.is_dead()
    assert replace(here, started="1").is_dead(), "the number was given to another process"


@pytest.mark.parametrize("name", ["host", "boot", "namespace"])
def test_a_process_of_another_machine_or_container_is_never_certainly_dead(name: str):
    assert not replace(Owner.current(0), pid=999_999_999, **{name: "another"}).is_dead()


def test_where_the_system_hides_start_times_a_running_process_is_not_dead(monkeypatch: pytest.MonkeyPatch):
    owner = Owner.current(0)
    monkeypatch.setattr("tasks.lease_store._process_start", lambda pid: "")
    assert not owner.is_dead()


def test_the_thread_is_part_of_the_owner():
    assert Owner.current(threading.get_ident()).is_this_thread()
    assert not Owner.current(0).is_this_thread()
    assert not replace(Owner.current(threading.get_ident()), pid=os.getpid() + 1).is_this_thread()


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", '{"owner": null}', '{"owner": {"host": "x"}}'])
def test_a_damaged_lease_has_no_owner_and_is_not_free(key: str, damage: str):
    lease = granted(key)
    lease.path.write_text(damage)
    current = newest(key)
    assert current is not None
    assert (current.token, current.owner, current.is_free()) == (lease.token, None, False)


def test_foreign_files_are_ignored(key: str):
    lease = granted(key)
    (lease.path.parent / "notes.json").write_text(json.dumps({}))
    (lease.path.parent / ".tmp-x").write_text("")
    assert newest(key) == lease
