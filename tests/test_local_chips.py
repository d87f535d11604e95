"""TPU chips on the PCI bus: what this machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from model import local_chips
from model.slices import slice_named


def bus(directory: Path, *devices: tuple[str, str]) -> Path:
    for number, (vendor, device) in enumerate(devices):
        entry = directory / f"0000:00:{number:02x}.0"
        entry.mkdir(parents=True)
        (entry / "vendor").write_text(vendor + "\n")
        (entry / "device").write_text(device + "\n")
    return directory


def test_a_host_is_the_slice_whose_chips_it_has_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ("0x8086", "0x0063")  # of another maker, with the number of a v5e
    monkeypatch.setattr(local_chips, "PCI_DEVICES", bus(tmp_path, *[("0x1ae0", "0x0063")] * 4, other))
    assert local_chips.local_chips() == {"v5e": 4}
    found = {name: local_chips.is_this_machine(slice_named(name)) for name in ("v5litepod-4", "v5litepod-8", "v6e-4", "v4-8")}
    assert found == {"v5litepod-4": True, "v5litepod-8": False, "v6e-4": False, "v4-8": False}
    (tmp_path / "0000:00:01.0" / "device").unlink()
    assert local_chips.local_chips() == {"v5e": 3}


def test_one_host_of_several_is_no_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_chips, "PCI_DEVICES", bus(tmp_path, *[("0x1ae0", "0x005e")] * 4))
    assert local_chips.is_this_machine(slice_named("v4-8"))
    assert not local_chips.is_this_machine(slice_named("v4-16"))


def test_a_machine_without_a_bus_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_chips, "PCI_DEVICES", tmp_path / "none")
    assert local_chips.local_chips() == {}
