"""Jobs on threads: at once, ended by the first failure or a stop, and harmless from then on."""

from __future__ import annotations

import threading

import pytest

from tasks.sources import DataError
from tasks.sources.parallel_jobs import Control, in_parallel


def test_jobs_run_at_once_and_the_first_failure_ends_the_others() -> None:
    together = threading.Barrier(4)
    control = Control("x")
    assert sorted(in_parallel([lambda number=number: together.wait() * 0 + number for number in range(4)], control, workers=4)) == [
        (number, number) for number in range(4)
    ]
    control, ran = Control("x"), []

    def fails() -> None:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        list(in_parallel([fails, *[lambda: ran.append(1)] * 50], control, workers=1))
    assert ran == []
