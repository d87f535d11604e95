"""How much memory a run takes, of its devices and of its host."""

from __future__ import annotations

import os
from pathlib import Path

import jax

_PROCESS_SIZES = Path("/proc/self/statm")


def memory_metrics() -> dict[str, float]:
    """GiB: `device/memory_gib` and `device/peak_memory_gib`, of the fullest local device, and `host/memory_gib`, resident here.

    Devices that keep no such counts (CPU) have no device metrics, and systems without /proc no host metric.
    """
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats()) is not None]
    metrics = {}
    for name, count in (("memory_gib", "bytes_in_use"), ("peak_memory_gib", "peak_bytes_in_use")):
        if sizes := [of[count] for of in stats if count in of]:
            metrics[f"device/{name}"] = max(sizes) / 2**30
    if _PROCESS_SIZES.exists():
        resident_pages = int(_PROCESS_SIZES.read_text(encoding="ascii").split()[1])
        metrics["host/memory_gib"] = resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    return metrics
