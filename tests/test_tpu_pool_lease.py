"""A control flow that stood still while another took its step over: it comes back, and cannot commit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.main_job import MainJob, assert_same_outcome, checkpoint_directory
from tests.prefect_server import Prefect
from tests.tpu_pool import LONG, Slices, last_names, trained

pytest_plugins = ["tests.tpu_pool_fixtures"]
pytestmark = pytest.mark.slow


def test_who_stood_still_does_not_commit(prefect: Prefect, slices: Slices, finished: MainJob, start: Callable[..., MainJob]) -> None:
    """All of its process stands still, so its lease is silent; training goes on, and is adopted with the lease."""
    before = len(prefect.flow_runs("pretrain"))
    first = start(*LONG)
    trained(first, 50)
    os.kill(first.process.pid, signal.SIGSTOP)
    second = start(*LONG)
    second.until("waiting for ")
    assert "which has not been heard of for" in second.succeed()
    manifest = (checkpoint_directory(second.root) / "manifest.json").stat()
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.status() == 1, first.output
    assert "lost the lease on" in first.output
    assert (checkpoint_directory(second.root) / "manifest.json").stat() == manifest
    assert len(prefect.flow_runs("pretrain")) == before + 1
    assert last_names(prefect)[-1] == "Completed"
    assert_same_outcome(second.root, finished.root)
    slices.gone()
