"""Slices of the Cloud TPU catalogue against Google's own tables."""

from __future__ import annotations

import math

import pytest

from model.flops import CHIPS
from model.slices import SLICES, slice_named

# From MaxText's accelerator_to_spec_map.py and the pages of the Cloud TPU versions.
DOCUMENTED = {
    "v4-8": "2x2x1", "v4-16": "2x2x2", "v4-32": "2x2x4", "v4-64": "2x4x4", "v4-128": "4x4x4", "v4-256": "4x4x8",
    "v4-384": "4x4x12", "v4-512": "4x8x8", "v4-1024": "8x8x8", "v4-1536": "8x8x12", "v4-2048": "8x8x16", "v4-4096": "8x16x16",
    "v5p-8": "2x2x1", "v5p-32": "2x2x4", "v5p-64": "2x4x4", "v5p-128": "4x4x4", "v5p-640": "4x4x20", "v5p-768": "4x8x12",
    "v5p-1152": "4x12x12", "v5p-2304": "8x12x12", "v5p-3072": "8x12x16", "v5p-3456": "12x12x12", "v5p-6912": "12x12x24",
    "v5p-7680": "12x16x20", "v5p-8192": "16x16x16", "v5p-10368": "12x12x36", "v5p-11648": "4x28x52", "v5p-12288": "16x16x24",
    "v5litepod-1": "1x1", "v5litepod-4": "2x2", "v5litepod-8": "2x4", "v5litepod-16": "4x4", "v5litepod-32": "4x8",
    "v5litepod-64": "8x8", "v5litepod-128": "8x16", "v5litepod-256": "16x16",
    "v6e-1": "1x1", "v6e-8": "2x4", "v6e-64": "8x8", "v6e-128": "8x16", "v6e-256": "16x16",
}  # fmt: skip


@pytest.mark.parametrize(("name", "topology"), DOCUMENTED.items())
def test_documented_topologies(name: str, topology: str) -> None:
    assert "x".join(map(str, slice_named(name).topology)) == topology


@pytest.mark.parametrize("name", SLICES)
def test_names_count_what_they_say(name: str) -> None:
    known = SLICES[name]
    assert known.name == name
    assert int(name.rpartition("-")[2]) == known.tensorcores
    assert known.num_chips == math.prod(known.topology) == known.num_hosts * known.chips_per_host
    assert known.tensorcores == known.num_chips * (2 if known.generation in ("v4", "v5p") else 1)
    assert len(known.wrap) == len(known.topology) == CHIPS[known.generation].ici_links // 2
    assert list(known.topology) == sorted(known.topology) or known.topology == (2, 2, 1)


def test_how_many_names_there_are() -> None:
    counts = {generation: sum(known.generation == generation for known in SLICES.values()) for generation in CHIPS}
    assert counts == {"v4": 52, "v5e": 8, "v5p": 94, "v6e": 8}


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("v4-64", (False, False, False)),
        ("v4-128", (True, True, True)),
        ("v5p-768", (True, True, True)),
        ("v5e-64", (False, False)),
        ("v5e-128", (False, True)),
        ("v6e-256", (True, True)),
    ],
)
def test_which_dimensions_are_rings(name: str, wrap: tuple[bool, ...]) -> None:
    assert slice_named(name).wrap == wrap


@pytest.mark.parametrize(("name", "hosts"), [("v4-8", 1), ("v4-128", 16), ("v5p-128", 16), ("v5e-8", 1), ("v5e-256", 64), ("v6e-1", 1)])
def test_hosts(name: str, hosts: int) -> None:
    assert slice_named(name).num_hosts == hosts


@pytest.mark.parametrize("spelled", ["v5e-256", "V5E-256", " v5litepod-256 ", "v5LitePod-256"])
def test_aliases_and_case(spelled: str) -> None:
    assert slice_named(spelled) is SLICES["v5litepod-256"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v4-100", "v4-128"),
        ("v5p-12416", "v5p-12288"),
        ("v5e-512", "v5litepod-256"),
        ("v6e-2", "v6e-1"),
        ("v5p128", "v5p-128"),
        ("v3-8", "v4-8"),
    ],
)
def test_an_unknown_slice_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest) as refusal:
        slice_named(name)
    assert "count TensorCores, 2 per chip" in str(refusal.value)
    assert repr(name) in str(refusal.value)


def test_what_the_compiler_is_told() -> None:
    arguments = slice_named("v5p-128").topology_arguments(num_slices=2)
    assert arguments["topology_name"] == "v5:4x4x4"
    assert arguments["chip_config_name"] == "megacore"
    assert arguments["num_slices"] == 2
    assert arguments["wrap"] == (True, True, True)
    assert slice_named("v6e-256").topology_arguments()["wrap"] == (True, True, False)
    assert slice_named("v6e-256").topology_arguments()["chip_config_name"] == "default"
