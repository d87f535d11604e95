"""Leases on steps: one process works on a step, others wait, and a holder that dies or falls silent is replaced.

`LeaseLockManager` follows Prefect's `LockManager` protocol without importing Prefect. A holder shows every 30 s that it
lives. One that is certainly dead (same machine) is replaced at once; any other after it was silent for 90 s by the
waiter's own clock, so clocks that disagree cannot steal a lease. A holder that lost its lease cannot commit.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks import lease_store, object_leases
from tasks.lease_store import Lease, directory_of
from tasks.places import ObjectPath
from tasks.storage import REFUSED, StorageError

_logger = logging.getLogger("prefect_llama.leases")


class LeaseStore(Protocol):
    """Where leases are kept. See `tasks.lease_store`, which keeps them as files, for what each function does."""

    def newest(self, key: str) -> Lease | None:
        """The lease in force for `key`."""
        ...

    def grant(self, key: str, holder: str, after: Lease | None, *, thread: int) -> Lease | None:
        """The lease that follows `after`, or None if another process was granted it first."""
        ...

    def beat(self, lease: Lease) -> None:
        """Shows that the holder lives."""
        ...

    def restore(self, lease: Lease) -> None:
        """Writes a lease again that was lost under its holder."""
        ...

    def give_back(self, lease: Lease) -> None:
        """Marks the lease as free."""
        ...


def store_of(key: str) -> LeaseStore:
    """Where the leases of `key` are kept: as files or as objects, beside the artifact that it is about."""
    return object_leases if isinstance(directory_of(key), ObjectPath) else lease_store


class LeaseLost(RuntimeError):
    """This process no longer holds the lease on a step, so it must not commit what it made."""


def log_plainly(level: int, message: str) -> None:
    """The default way to tell what happens: the logger `prefect_llama.leases`."""
    _logger.log(level, message)


@dataclass
class _Held:
    """A lease held by this process: when to stop showing that it lives, and the thread without which it does not."""

    lease: Lease
    thread: threading.Thread | None
    deadline: float | None
    stop: threading.Event = field(default_factory=threading.Event)


class _Silence:
    """How long a lease has not changed, counted only while somebody looks.

    A gap between two looks counts at most twice the usual one: a waiter that was itself suspended, perhaps together with
    the holder, has not seen the holder fall silent.
    """

    def __init__(self, usual_gap: float) -> None:
        self._most = 2 * usual_gap
        self._seen: tuple[int, int] | None = None
        self._looked = 0.0
        self._silent = 0.0

    def look(self, lease: Lease) -> float:
        """Seconds for which `lease` has been seen unchanged, including this look."""
        now = time.monotonic()
        state = (lease.token, lease.heartbeat)
        self._silent = self._silent + min(now - self._looked, self._most) if state == self._seen else 0.0
        self._seen, self._looked = state, now
        return self._silent


class LeaseLockManager:
    """Locks for Prefect transactions that die with their holder. Keys are `artifact:{directory}@{fingerprint}`.

    heartbeat_seconds, expiry_seconds: how often a holder shows that it lives, and after how much silence it is replaced.
    poll_seconds: how often a waiter looks. tell: called with a logging level and a message; a module-level function, so
    that the manager can be pickled. What a process holds does not travel with a pickled manager.
    """

    def __init__(
        self,
        heartbeat_seconds: float = 30.0,
        expiry_seconds: float = 90.0,
        poll_seconds: float = 0.5,
        tell: Callable[[int, str], None] = log_plainly,
    ) -> None:
        if not 0 < heartbeat_seconds < expiry_seconds:
            raise ValueError(f"heartbeat_seconds={heartbeat_seconds} must be above 0 and below expiry_seconds={expiry_seconds}")
        self._arguments = (heartbeat_seconds, expiry_seconds, poll_seconds, tell)
        self._heartbeat_seconds = heartbeat_seconds
        self._expiry_seconds = expiry_seconds
        self._poll_seconds = poll_seconds
        self._tell = tell
        self._held: dict[str, _Held] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> LeaseLockManager:
        # Prefect copies cache policies; a copy that forgot what it holds would call every lease lost
        return self

    def acquire_lock(self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None) -> bool:
        """Waits until `holder` has the lease on `key`; False after `acquire_timeout` seconds (None waits for ever).

        hold_timeout: seconds after which the heartbeat ends, so that others may take over. Raises StorageError when the
        place of the leases cannot be written.
        """
        return self._acquire(key, holder, acquire_timeout, hold_timeout, threading.current_thread())

    async def aacquire_lock(self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None) -> bool:
        """`acquire_lock` without blocking the event loop."""
        return await asyncio.to_thread(self._acquire, key, holder, acquire_timeout, hold_timeout, None)

    def _acquire(
        self, key: str, holder: str, acquire_timeout: float | None, hold_timeout: float | None, thread: threading.Thread | None
    ) -> bool:
        deadline = _deadline(acquire_timeout)
        silence = _Silence(self._poll_seconds)
        announced: int | None = None
        while True:
            current = store_of(key).newest(key)
            held = self._held.get(key)
            if held is not None and held.lease == current and held.lease.holder == holder:
                return True
            why_free = self._why_free(current, silence)
            if why_free is None:
                assert current is not None
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                if announced != current.token:
                    announced = current.token
                    self._tell(logging.INFO, f"waiting for {_owner_of(current)}, which has been running this step since {current.since}")
                time.sleep(self._poll_seconds)
            elif self._take(key, holder, current, _deadline(hold_timeout), thread):
                if why_free:
                    self._tell(logging.WARNING, f"taking over {_step_of(key)} from {_owner_of(current)}, {why_free}")
                return True

    def _take(self, key: str, holder: str, current: Lease | None, deadline: float | None, thread: threading.Thread | None) -> bool:
        try:
            lease = store_of(key).grant(key, holder, current, thread=0 if thread is None else thread.ident or 0)
        except StorageError as error:
            if error.errno not in REFUSED:
                raise
            # what is already committed in a read-only place can be reused; assert_held stops whoever wants to write
            self._tell(logging.WARNING, f"no lease on {_step_of(key)}, so it can only be reused: {error}")
            return True
        if lease is None:
            return False
        if (before := self._held.get(key)) is not None:
            before.stop.set()
        held = self._held[key] = _Held(lease, thread, deadline)
        threading.Thread(target=self._keep_alive, args=(key, held), daemon=True, name="lease-heartbeat").start()
        return True

    def _why_free(self, current: Lease | None, silence: _Silence) -> str | None:
        """None while the lease is held; "" if nobody holds it; else why its holder can be replaced."""
        if current is None or current.released:
            return ""
        if current.owner is not None and current.owner.is_dead():
            return "which no longer runs"
        if current.owner is not None and current.owner.is_this_thread():
            # an earlier transaction of this very thread ended without giving its lease back: nobody else can end it
            return "which left it behind"
        silent = silence.look(current)
        return f"which has not been heard of for {silent:.0f} s" if silent >= self._expiry_seconds else None

    def _keep_alive(self, key: str, held: _Held) -> None:
        while not held.stop.wait(self._heartbeat_seconds):
            over = held.deadline is not None and time.monotonic() >= held.deadline
            if over or (held.thread is not None and not held.thread.is_alive()):
                return
            try:
                self._check(key, held.lease)
                store_of(key).beat(held.lease)
            except LeaseLost as error:
                if not held.stop.is_set():  # given back between the wait and the look
                    self._tell(logging.ERROR, str(error))
                return
            except OSError as error:
                self._tell(logging.WARNING, f"cannot renew the lease on {_step_of(key)}, trying again: {error}")

    def _check(self, key: str, lease: Lease) -> None:
        current = store_of(key).newest(key)
        if current is None:
            store_of(key).restore(lease)
            current = store_of(key).newest(key)
        if current != lease:
            raise LeaseLost(
                f"lost the lease on {_step_of(key)} to {_owner_of(current)}: this process was silent for too long and will not "
                "commit. Run the same command again: it reuses or continues the other's work"
            )

    def assert_held(self, key: str, holder: str | None = None) -> None:
        """Returns if this process (for `holder`, if given) holds the lease on `key` now; raises LeaseLost if not."""
        held = self._held.get(key)
        if held is None or (holder is not None and held.lease.holder != holder):
            raise LeaseLost(f"this process does not hold the lease on {_step_of(key)}")
        self._check(key, held.lease)

    def held_by(self, key: str) -> str | None:
        """The holder for whom this process took the lease on `key`, or None."""
        held = self._held.get(key)
        return None if held is None else held.lease.holder

    def release_lock(self, key: str, holder: str) -> None:
        """Gives the lease back at once. A lease that was lost meanwhile stays with its new holder."""
        held = self._held.get(key)
        if held is None or held.lease.holder != holder:
            return
        del self._held[key]
        held.stop.set()
        try:
            if store_of(key).newest(key) == held.lease:
                store_of(key).give_back(held.lease)
        except OSError as error:
            # the work is committed; others replace this silent holder after expiry
            self._tell(logging.WARNING, f"could not give back the lease on {_step_of(key)}: {error}")

    def is_locked(self, key: str) -> bool:
        """Whether some holder that may be alive has the lease on `key`."""
        current = store_of(key).newest(key)
        return current is not None and not current.is_free()

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether `holder` has the lease on `key`."""
        current = store_of(key).newest(key)
        return current is not None and not current.released and current.holder == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Waits until nobody that may be alive has the lease on `key`; False after `timeout` seconds."""
        deadline = _deadline(timeout)
        silence = _Silence(self._poll_seconds)
        while self._why_free(store_of(key).newest(key), silence) is None:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(self._poll_seconds)
        return True

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """`wait_for_lock` without blocking the event loop."""
        return await asyncio.to_thread(self.wait_for_lock, key, timeout)


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _step_of(key: str) -> str:
    return str(directory_of(key))


def _owner_of(lease: Lease | None) -> str:
    return "another process" if lease is None or lease.owner is None else str(lease.owner)
