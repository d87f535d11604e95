"""Shared by the tests of downloads: a file to bring, requests that wait for nothing, and what is left of a try."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.sources import SourceFile, remote_files, request_limits
from tasks.sources.parallel_jobs import Control
from tasks.sources.request_limits import RequestLimiter, RetryRule
from tasks.sources.transfer import Transfer

DATA = random.Random(0).randbytes(5 << 19)
DIGEST = hashlib.sha256(DATA).hexdigest()
CUT = 1_500_000
# Seconds that nobody waited, and that are over all the same.
PASSED = [0.0]


class Waits(Control):
    """A control that writes waits down and does not wait."""

    def __init__(self) -> None:
        super().__init__("the download of web")
        self.seconds: list[float] = []

    def wait(self, seconds: float) -> None:
        self.seconds.append(seconds)
        PASSED[0] += seconds
        self.check()


def quick_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, attempts: int) -> None:
    """No memory of other tests, and no waits to speak of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_files, "_recent", {})
    monkeypatch.setattr(request_limits, "LIMITER", RequestLimiter(per_second=1e6, clock=lambda: time.monotonic() + PASSED[0]))
    monkeypatch.setattr(request_limits, "RULE", RetryRule(attempts=attempts, first_seconds=0.001))


def planned(url: str, **changes: Any) -> SourceFile:
    return SourceFile(**{"name": "a.bin", "bytes": len(DATA), "sha256": DIGEST, "location": url, **changes})


def bring(file: SourceFile, target: Path, control: Control | None = None) -> tuple[str, int]:
    with Transfer(control or Waits(), told=lambda line: None, on_bytes=lambda count: None) as engine:
        return engine.bring(file, target)


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())
