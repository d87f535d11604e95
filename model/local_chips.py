"""Whether this machine is a TPU slice by itself, as its PCI bus tells without loading JAX (which would take the chips)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from model.slices import Generation, Slice

PCI_DEVICES = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
# As JAX looks for them (jax/_src/hardware_utils.py).
_GENERATIONS: dict[str, Generation] = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e"}


def is_this_machine(tpu_slice: Slice) -> bool:
    """Whether the slice has one host, and this machine has just its chips."""
    return local_chips() == {tpu_slice.generation: tpu_slice.num_chips}


def local_chips() -> dict[Generation, int]:
    """TPU chips of this machine by generation."""
    found: Counter[Generation] = Counter()
    for device in PCI_DEVICES.glob("*"):
        try:
            vendor, model = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "device"))
        except OSError:  # it was taken out of the bus meanwhile
            continue
        if vendor == _GOOGLE and model in _GENERATIONS:
            found[_GENERATIONS[model]] += 1
    return dict(found)
