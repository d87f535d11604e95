"""What the XLA compiler of the tests' own processes is told: as this process, but for the number of devices.

`make test` tells it to optimize little, which halves what the tests cost: their programs are small, and compiling takes longest.
"""

from __future__ import annotations

import os

_DEVICES = "--xla_force_host_platform_device_count"


def xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS for a process with so many CPU devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES)]
    return " ".join([*flags, f"{_DEVICES}={devices}"] if devices > 1 else flags)
