"""How often servers are asked, and when they are asked again: one rate for all threads, jittered waits, Retry-After."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")


class Unavailable(Exception):
    """A try that failed in a way which another try can mend.

    retry_after: seconds that the server asks to wait, or None.
    everyone: whether it is about this client as a whole, so that its other requests wait too.
    again: False where another try helps only after someone has changed something here.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, everyone: bool = False, again: bool = True) -> None:
        super().__init__(message)
        self.retry_after, self.everyone, self.again = retry_after, everyone, again


def is_retried(status: int) -> bool:
    """Whether a request with this HTTP status is worth repeating: 408, 429 and 5xx."""
    return status in (408, 429) or 500 <= status <= 599


def retry_after_seconds(value: str | None, now: datetime | None = None) -> float | None:
    """The wait that a Retry-After header asks for (RFC 9110, 10.2.3: seconds, or a date); None where there is none that can be read."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max((aware - (now or datetime.now(UTC))).total_seconds(), 0.0)


class RequestLimiter:
    """A token bucket that all threads share, and a pause that all of them keep.

    per_second: requests a second in the long run. burst: how many may go at once after a quiet time.
    """

    def __init__(self, per_second: float = 10.0, burst: int = 10, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._tolerance = 1.0 / per_second, (burst - 1) / per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._due = self._paused_until = clock()

    def acquire(self, wait: Callable[[float], None], tokens: int = 1) -> None:
        """Returns when a request may be sent; waits by calling `wait(seconds)`. With 0 tokens it is not counted as one."""
        while (seconds := self._take(tokens)) > 0:
            wait(seconds)

    def pause(self, seconds: float) -> None:
        """No request of anyone's for so long."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    def _take(self, tokens: int) -> float:
        """Takes the tokens; or the seconds to wait, with none taken (the generic cell rate algorithm, ITU-T I.371)."""
        with self._lock:
            now = self._clock()
            seconds = max(self._due - self._tolerance, self._paused_until) - now
            if seconds <= 0:
                self._due = max(self._due, now) + tokens * self._interval
            return seconds


@dataclass(frozen=True)
class RetryRule:
    """Full jitter: a random wait below a bound that doubles (Brooker, "Exponential Backoff And Jitter", AWS 2015).

    attempts: tries in a row without progress. first_seconds, longest_seconds: the first bound and the last.
    patience_seconds: the longest wait that a server may ask for.
    """

    attempts: int = 8
    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    patience_seconds: float = 600.0

    def seconds(self, failures: int, retry_after: float | None) -> float:
        """The wait after so many failures in a row; never less than what the server asked for."""
        bound = min(self.longest_seconds, self.first_seconds * 2 ** (failures - 1))
        jitter = random.uniform(0.0, bound)  # noqa: S311 (spreads load, hides nothing)
        return jitter if retry_after is None else retry_after + min(jitter, self.first_seconds)


LIMITER = RequestLimiter()
RULE = RetryRule()


@dataclass
class Requests:
    """Sends requests under the limiter of this process, again where that can help.

    wait: sleeps so many seconds, or raises to end the waiting. told: is given a line about every failed try.
    attempts: tries in a row without progress; None: as RULE has it.
    """

    wait: Callable[[float], None] = time.sleep
    told: Callable[[str], None] = logging.getLogger(__name__).warning
    attempts: int | None = None

    def heed_pause(self) -> None:
        """Waits as long as everyone has to, in the middle of what `call` let begin."""
        LIMITER.acquire(self.wait, tokens=0)

    def call(self, attempt: Callable[[], T], *, progressed: Callable[[], bool] = lambda: False) -> T:
        """What `attempt` returns in the end. `progressed`: whether the try that failed brought the work forward.

        Raises Unavailable where the last try failed too, or the server asks for more patience than there is.
        """
        failures, attempts = 0, self.attempts or RULE.attempts
        while True:
            LIMITER.acquire(self.wait)
            try:
                return attempt()
            except Unavailable as error:
                failures = 1 if progressed() else failures + 1
                if not error.again:
                    raise
                if failures >= attempts:
                    raise Unavailable(f"{error}, in {failures} tries") from None
                if error.retry_after is not None and error.retry_after > RULE.patience_seconds:
                    raise Unavailable(f"{error}, and asks to wait {error.retry_after:.0f} s") from None
                seconds = RULE.seconds(failures, error.retry_after)
                self.told(f"{error}; try {failures + 1} of {attempts} in {seconds:.1f} s")
                if error.everyone:
                    LIMITER.pause(seconds)
            self.wait(seconds)


def listing_requests() -> Requests:
    """For a plan, at which a person waits: what a server listed before does when it is away, so a few tries are enough."""
    return Requests(attempts=min(4, RULE.attempts))
