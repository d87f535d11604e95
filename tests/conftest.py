"""Shared by all tests: the environment that must be set before JAX is first imported."""

import atexit
import os
import shutil
import tempfile

import hypothesis
import pytest

from tests.cpu_compiler import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(devices=8)

# Many tests start the same training process: it compiles the same step each time, and that is most of what the tests cost.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# a loaded machine must not fail a test, and two runs must test the same
hypothesis.settings.register_profile("untimed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("untimed")

# Two processes take file after file: the long ones first, so that neither is left with one at the end.
LONGEST_FIRST = (
    "test_main_job.py", "test_trainer.py", "test_preflight_command.py", "test_deployment.py", "test_train_step.py", "test_partitioning.py",
    "test_processes.py", "test_caching.py", "test_completion.py", "test_harness.py", "test_initialize.py", "test_evaluation.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files; the tests of one file stay together and in their order."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else len(LONGEST_FIRST))
