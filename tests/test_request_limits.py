"""Rates, waits and retries: spaced over all threads, jittered, and as servers ask."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tasks.sources import request_limits
from tasks.sources.request_limits import RequestLimiter, Requests, RetryRule, Unavailable, retry_after_seconds


def test_the_limiter_spaces_requests_and_pauses_everyone() -> None:
    now = [0.0]
    limiter = RequestLimiter(per_second=2.0, burst=3, clock=lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    times = []
    for _ in range(6):
        limiter.acquire(wait)
        times.append(now[0])
    assert times == [0.0, 0.0, 0.0, 0.5, 1.0, 1.5]
    limiter.pause(10)
    limiter.acquire(wait, tokens=0)
    assert now[0] == 11.5
    for _ in range(4):
        limiter.acquire(wait)
    assert now[0] == 12.0


def test_one_told_to_wait_makes_all_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(request_limits, "LIMITER", RequestLimiter(per_second=1e6, clock=lambda: now[0]))
    answers = iter([Unavailable("busy", retry_after=5.0, everyone=True)])

    def attempt() -> str:
        for error in answers:
            raise error
        return "done"

    def other(seconds: float) -> None:
        now[0] += seconds

    assert Requests(wait=lambda seconds: None if now[0] >= 5 else request_limits.LIMITER.acquire(other)).call(attempt) == "done"
    assert now[0] >= 5.0


def test_waits_grow_with_jitter_and_keep_to_what_was_asked() -> None:
    rule = RetryRule(first_seconds=1.0, longest_seconds=8.0)
    for failures, bound in ((1, 1), (2, 2), (3, 4), (4, 8), (9, 8)):
        waits = [rule.seconds(failures, None) for _ in range(200)]
        assert bound / 2 < max(waits) <= bound
        assert min(waits) < bound / 2
        assert all(30 <= rule.seconds(failures, 30.0) <= 31 for _ in range(20))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("12", 12.0), ("Tue, 01 Sep 2026 10:00:30 GMT", 30.0), ("Tue, 01 Sep 2026 09:00:00 GMT", 0.0), ("soon", None), (None, None)],
)
def test_retry_after_is_read_in_seconds_and_as_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, datetime(2026, 9, 1, 10, tzinfo=UTC)) == seconds
