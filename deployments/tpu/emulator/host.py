"""One simulated TPU VM: a metadata server, a disk, and the processes of its startup script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deployments.tpu.emulator.metadata import MetadataServer
from deployments.tpu.emulator.processes import MARK, end_processes
from model.child import CHECKOUT, child_environment
from tasks.places import CACHE_VARIABLE

SIMULATED_SLICE = "PREFECT_LLAMA_SIMULATED_SLICE"  # environment variable: the accelerator type that a host is part of
DISKS = "disks"  # the directory of the working directories of hosts that are there
_ADDRESSES = ("SECRET_MANAGER_ADDRESS",)  # of other services that may be emulated beside this one
_DEVICES_FLAG = "--xla_force_host_platform_device_count"


@dataclass(frozen=True)
class HostPlace:
    """Which host this is."""

    project: str
    zone: str
    node_id: str
    worker: int  # from 0 within its node
    accelerator_type: str
    devices: int  # virtual CPU devices


class Host:
    """A simulated TPU VM, off at first. Any thread may call it."""

    def __init__(self, place: HostPlace, directory: Path, attributes: Callable[[], dict[str, str]]) -> None:
        name = f"{place.node_id}-w{place.worker}"
        self.place = place
        self.log = directory / f"{name}.log"
        self.metadata = MetadataServer(attributes, project=place.project, zone=place.zone)
        self._attributes = attributes
        # A disk of its own: another node may have had the name, or have it in another zone.
        (directory / DISKS).mkdir(exist_ok=True)
        self._disk = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=directory / DISKS))
        self._lock = threading.Lock()
        self._machine: subprocess.Popen[bytes] | None = None
        self._mark = ""
        self._removed = False

    def boot(self) -> None:
        """Runs the startup script. A host that is on stays as it is, and one that was removed stays off.

        Raises:
            OSError: no process can be started.
        """
        with self._lock:
            if self._removed or self._machine is not None:
                return
            self._mark = uuid.uuid4().hex  # of this boot, so that a shutdown that is under way spares the next one
            order = {
                "script": self._attributes().get("startup-script", ""),
                "directory": str(self._disk),
                "environment": self._environment(),
            }
            with self.log.open("ab") as log:
                self._machine = subprocess.Popen(
                    [sys.executable, "-m", "deployments.tpu.emulator.machine"],
                    env={name: value for name, value in child_environment().items() if name != MARK},
                    cwd=CHECKOUT,  # this process's own may be gone
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            assert self._machine.stdin is not None
            self._machine.stdin.write(json.dumps(order).encode() + b"\n")
            self._machine.stdin.flush()

    def shutdown(self, grace: float) -> None:
        """SIGTERM to every process, SIGKILL after `grace` seconds to those left; 0 is a power cut. Guest attributes and the disk stay."""
        with self._lock:
            machine, mark = self._machine, self._mark
        if machine is None:
            return
        end_processes(mark, machine.pid, grace)
        with self._lock:
            if self._machine is machine:
                assert machine.stdin is not None
                with suppress(BrokenPipeError):  # it was killed from outside
                    machine.stdin.close()
                machine.wait()
                self._machine = None

    def remove(self, grace: float) -> None:
        """Off for good: its disk and its metadata server go too; its log stays."""
        with self._lock:
            first, self._removed = not self._removed, True
        self.shutdown(grace)
        if first:
            self.metadata.close()
            shutil.rmtree(self._disk, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        elsewhere = {name: os.environ[name] for name in _ADDRESSES if name in os.environ}
        return elsewhere | {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(Path.home()),
            "GCE_METADATA_HOST": self.metadata.address,
            "GCE_METADATA_IP": self.metadata.address,
            "GCE_METADATA_ROOT": self.metadata.address,  # TensorStore's name for it
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(os.environ.get("XLA_FLAGS", ""), self.place.devices),
            SIMULATED_SLICE: self.place.accelerator_type,
            "TMPDIR": str(self._disk),  # what is left there goes with the host
            CACHE_VARIABLE: str(self._disk / "cache"),  # and so do copies of what lies in a bucket
            MARK: self._mark,
        }


def xla_flags(flags: str, devices: int) -> str:
    """`flags` with the number of virtual CPU devices set to `devices`."""
    others = re.sub(rf"{_DEVICES_FLAG}=\S*", "", flags).split()
    return " ".join([*others, f"{_DEVICES_FLAG}={devices}"])
