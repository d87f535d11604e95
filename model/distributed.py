"""Several processes as one run: joining them, and agreeing on what any one of them was asked to do.

A run on several hosts is one process a host, each with the same job. They find each other by the variables below, or, on a
TPU slice, by the slice's own metadata. Process 0 speaks for the run: it alone writes curves, samples and trackers.

    JAX_COORDINATOR_ADDRESS=10.0.0.2:8476 JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=0
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.slices import slice_named
from model.train_config import SimpleTrainConfig

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes(train: SimpleTrainConfig) -> None:
    """Connects this process to the others of the run; with one process there is nothing to connect.

    Raises:
        ValueError: some of `VARIABLES` are set and others not, or one is no number.
    """
    # JAX's own preemption service takes SIGTERM away from the process that has to save on it.
    jax.config.update("jax_enable_preemption_service", False)
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    if any(given.values()):
        address, count, index = given.values()
        if not (address and count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            told = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"{told}: set all three, an address host:port and numbers with JAX_PROCESS_ID below JAX_NUM_PROCESSES")
        if int(count) > 1:
            jax.distributed.initialize(address, int(count), int(index))
    elif train.accelerator_type is not None and slice_named(train.accelerator_type).num_hosts * train.slice_count > 1:
        jax.distributed.initialize()  # each host of a slice knows the others from its metadata


def is_leader() -> bool:
    """Whether this process speaks for the run."""
    return jax.process_index() == 0


def records_directory(directory: Path) -> Path:
    """Where this process writes what only one may write: the run's directory, or a scratch one that nobody reads."""
    if is_leader():
        return directory
    scratch = Path(tempfile.mkdtemp(prefix="prefect-llama-process-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def leaders_word(value: int) -> int:
    """Process 0's `value`, on every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(name: str) -> None:
    """Returns when every process came here."""
    multihost_utils.sync_global_devices(name)


class Agreement:
    """What any process was asked to do, known to all of them at the same step.

    Each says its part with a step that it starts, and reads the answer with that step's metrics: the devices
    take the maximum, so nobody waits for it. One process has nothing to agree on and answers at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._maximum = jax.jit(lambda said: said.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def say(self, request: int) -> jax.Array | None:
        """Starts to tell the others this process's `request`, a small number; more than theirs prevails."""
        if self._alone:
            return None
        mine = np.array([request], np.int32)
        return self._maximum(jax.make_array_from_callback(self._shape, self._sharding, lambda _: mine))

    def answer(self, said: jax.Array | None, request: int) -> int:
        """What all agreed on when `said` was said; alone, this process's `request` of now."""
        return request if said is None else int(said)
