"""The devices of TPU slices that this machine does not have, for ahead-of-time compilation. Call `prepare` before JAX is imported.

Imports JAX inside its functions only: what must be in the environment first is part of this module's purpose.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

from model.slices import Slice

# libtpu looks for chips of this machine and for a Cloud VM's metadata server, and keeps other processes out with a lock file.
# None of these may be the caller's: they change what is compiled, or by which libtpu. What is compiled is said by the order alone.
_SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MEGASCALE_", "PJRT_")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # of the machine it believes to be on; what is compiled for is said apart
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "4",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TF_CPP_MIN_LOG_LEVEL": "4",
}


def prepare() -> None:
    """Makes the environment that libtpu and JAX read when they are loaded the same whatever the caller's was.

    Raises:
        RuntimeError: JAX was imported already.
        ValueError: libtpu is not installed.
    """
    if "jax" in sys.modules:
        raise RuntimeError("model.preflight.topology.prepare must come before the first import of jax")
    check_compiler()
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)


def check_compiler() -> None:
    """Raises ValueError where libtpu, the TPU compiler, is not installed."""
    if find_spec("libtpu") is None:
        raise ValueError(
            "libtpu is not installed, and it is the compiler (Linux on x86-64 only): pip install 'jax[tpu]', or use requirements.lock"
        )


def slice_devices(tpu_slice: Slice, num_slices: int) -> list[Any]:
    """Devices of `num_slices` slices, slice by slice.

    Raises:
        ValueError: this libtpu does not know the topology.
    """
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(**tpu_slice.topology_arguments(num_slices))
    except Exception as error:  # jaxlib's own class, without a stable name
        raise ValueError(f"libtpu cannot compile for {num_slices} x {tpu_slice.name} ({tpu_slice.topology_name}): {error}") from error
    return list(topology.devices)
