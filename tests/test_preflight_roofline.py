"""Bounds of a step from its costs, worked out by hand."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from model.config import LlamaConfig
from model.flops import CHIPS, executed_flops_per_token, train_flops_per_token
from model.preflight.hlo import Collective, HloCost, Network, Phase
from model.preflight.roofline import Roofline, links_of, roofline
from model.slices import slice_named

R1 = LlamaConfig(seq_len=2048, hidden_dim=2048, intermediate_dim=8192, num_heads=16, num_kv_heads=16, num_layers=24, vocab_size=128_256)
V4_128 = slice_named("v4-128")
TORUS = tuple(itertools.product(range(4), repeat=3))


def collective(
    kind: str,
    wire_bytes: float,
    group: tuple[int, ...],
    *,
    is_async: bool = False,
    network: Network = "ici",
    torus_dimensions: int | None = None,
    colors: int | None = None,
) -> Collective:
    return Collective(kind, is_async, 1, wire_bytes, wire_bytes, group, "bf16", network, torus_dimensions, colors, "c", "main")


def costs(*collectives: Collective, hbm_bytes: float = 200e9) -> HloCost:
    return HloCost(collectives, 0.0, hbm_bytes, {}, (), 64)


def bounds(cost: HloCost, **options: object) -> Roofline:
    """Of the reference job on v4-128 that keeps everything but the output projection."""
    arguments = {"model_flops_per_chip": 97.0e12, "executed_flops_per_chip": 103.0e12, "tokens_per_chip": 8192.0} | options
    return roofline(CHIPS["v4"], V4_128, cost, **arguments)  # type: ignore[arg-type]


EVERYONE, PLANE, RING = tuple(range(64)), tuple(range(0, 64, 4)), (0, 1, 2, 3)


def test_compute_bound_and_nothing_exposed() -> None:
    found = bounds(costs(collective("all-gather", 6e9, EVERYONE, is_async=True)))
    assert found.bound == "compute"
    assert found.compute_seconds == pytest.approx(103.0e12 / 275e12)
    assert found.hbm_seconds == pytest.approx(200e9 / 1.228e12)
    assert found.ici_seconds == pytest.approx(6e9 / 270e9)
    assert found.exposed_ici_seconds == 0
    assert found.mfu_bound_hidden == found.mfu_bound_exposed == pytest.approx(97 / 103)
    assert found.step_seconds == found.compute_seconds
    assert found.tokens_per_second_per_chip == pytest.approx(8192 / found.compute_seconds)
    assert found.recomputation == pytest.approx(103 / 97)


def test_the_reference_job_as_it_was_measured() -> None:
    # two mesh axes and a matmul that scatters as it goes: 0.95 GB in step with all chips, 1.0 over planes, 0.23 over rings, the rest apart
    tokens = 256 * 2048 / 64
    found = bounds(
        costs(
            collective("all-gather", 0.983e9, EVERYONE),
            collective("reduce-scatter", 0.985e9, PLANE, torus_dimensions=2, colors=2),
            collective("reduce-scatter", 0.229e9, RING, torus_dimensions=1),
            collective("all-gather", 5.945e9, EVERYONE, is_async=True),
            collective("collective-permute", 3.423e9, PLANE, is_async=True),
            hbm_bytes=267.7e9,
        ),
        model_flops_per_chip=train_flops_per_token(R1, 2048) * tokens,
        executed_flops_per_chip=executed_flops_per_token(R1, 2048, remat="save_all", attention="splash") * tokens,
    )
    assert found.mfu_bound_hidden == pytest.approx(0.942, abs=5e-4)
    assert found.mfu_bound_exposed == pytest.approx(0.9135, abs=1e-3)
    assert found.mfu_bound_exposed_by_colors < found.mfu_bound_exposed
    assert found.ici_bytes_per_chip == pytest.approx(11.56e9, rel=1e-3)
    assert found.all_gather_async_share == pytest.approx(0.858, abs=1e-3)


def test_no_fewer_flops_are_executed_than_the_program_has() -> None:
    phases = (Phase("layers", 24, 100e12, 1.0, 0), Phase("head", 1, 10e12, 1.0, 0))
    cost = dataclasses.replace(costs(), dot_flops=110e12, phases=phases)
    found = bounds(cost)  # by the formula 103e12
    assert found.executed_flops_per_chip == 110e12
    assert found.compute_seconds == found.on_chip_seconds == pytest.approx(110e12 / 275e12)
    with_kernels = dataclasses.replace(cost, phases=(dataclasses.replace(phases[0], kernels=48), phases[1]))
    assert bounds(with_kernels).on_chip_seconds == pytest.approx(110e12 / 275e12)
    more = bounds(with_kernels, executed_flops_per_chip=120e12)  # what the formula has more is the kernels'
    assert more.on_chip_seconds == pytest.approx(120e12 / 275e12)


def test_integers_are_multiplied_at_their_own_peak() -> None:
    v5e = slice_named("v5e-256")
    cost = dataclasses.replace(costs(hbm_bytes=1.0), dot_flops=90e12, int8_flops=40e12, phases=(Phase("layers", 24, 90e12, 1.0, 4, 40e12),))
    arguments = {"model_flops_per_chip": 80e12, "executed_flops_per_chip": 100e12, "tokens_per_chip": 8192.0}
    found = roofline(CHIPS["v5e"], v5e, cost, **arguments)  # type: ignore[arg-type]
    assert found.compute_seconds == found.on_chip_seconds == pytest.approx(60e12 / 197e12 + 40e12 / 394e12)
    assert found.mfu_bound_exposed == pytest.approx(80e12 / 197e12 / found.compute_seconds)


def test_synchronous_collectives_add_up() -> None:
    found = bounds(costs(collective("all-reduce", 8.4e9, EVERYONE), collective("reduce-scatter", 1.8e9, RING)))
    assert found.exposed_ici_seconds == pytest.approx(8.4e9 / 270e9 + 1.8e9 / 90e9)
    assert found.mfu_bound_exposed == pytest.approx(97.0e12 / 275e12 / (103.0e12 / 275e12 + found.exposed_ici_seconds))


@pytest.mark.parametrize(
    ("cost", "bound"),
    [
        (costs(hbm_bytes=600e9), "hbm"),
        (costs(collective("all-gather", 150e9, EVERYONE, is_async=True)), "ici"),
        (costs(collective("all-reduce", 5e9, (1, 2), is_async=True, network="dcn")), "dcn"),
    ],
)
def test_what_binds(cost: HloCost, bound: str) -> None:
    found = bounds(cost)
    slowest = {"hbm": found.hbm_seconds, "ici": found.ici_seconds, "dcn": found.dcn_seconds}[bound]
    assert found.bound == bound
    assert found.step_seconds == pytest.approx(slowest)
    assert found.mfu_bound_hidden == pytest.approx(97.0e12 / 275e12 / slowest)


@pytest.mark.parametrize(
    ("slice_name", "size", "links"),
    [
        ("v4-128", 64, 6),
        ("v4-128", 16, 4),
        ("v4-128", 4, 2),
        ("v4-128", 8, 3),  # one ring and half of another
        ("v4-256", 8, 2),
        ("v4-256", 32, 4),
        ("v4-32", 16, 3),  # no wrap-around links below a cube
        ("v5e-256", 256, 4),
        ("v5e-256", 16, 2),
        ("v6e-128", 128, 3),
        ("v6e-64", 64, 2),
        ("v5e-64", 8, 1),
        ("v6e-1", 1, 1),
    ],
)
def test_links_by_size_of_the_group(slice_name: str, size: int, links: int) -> None:
    assert links_of(collective("all-gather", 1.0, tuple(range(size))), slice_named(slice_name)) == links


def test_links_by_place_on_the_torus() -> None:
    def links(*group: int) -> int:
        return links_of(collective("all-gather", 1.0, group), V4_128, TORUS)

    assert links(*EVERYONE) == 6
    assert links(*PLANE) == 4
    assert links(*RING) == 2
    assert links(0, 1) == 1
    assert links(0, 1, 4, 5, 16, 17, 20, 21) == 3


def test_a_single_ring_over_a_plane_drives_two_links() -> None:
    assert links_of(collective("all-gather", 1.0, tuple(range(256)), torus_dimensions=1), slice_named("v5e-256")) == 2
    assert links_of(collective("all-gather", 1.0, tuple(range(256)), torus_dimensions=2), slice_named("v5e-256")) == 4


def test_a_permute_steps_along_one_ring() -> None:
    assert links_of(collective("collective-permute", 1.0, PLANE), V4_128) == 2
    assert links_of(collective("collective-permute", 1.0, RING), slice_named("v4-16")) == 1


def test_field_names_are_those_of_the_report() -> None:
    names = {field.name for field in dataclasses.fields(Roofline)}
    assert names >= {
        "executed_flops_per_chip",
        "model_flops_per_chip",
        "ici_bytes_per_chip",
        "all_gather_async_share",
        "mfu_bound_exposed",
        "mfu_bound_hidden",
        "step_seconds",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_flops_per_chip": 0.0}, "model_flops_per_chip=0.0"),
        ({"tokens_per_chip": -1.0}, "tokens_per_chip=-1.0"),
        ({"coordinates": TORUS[:8]}, "coordinates of 8 partitions, the program has 64"),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounds(costs(), **options)


def test_another_generations_chip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chip v5p is not that of slice v4-128: pass CHIPS\['v4'\]"):
        roofline(CHIPS["v5p"], V4_128, costs(), model_flops_per_chip=1.0, executed_flops_per_chip=1.0, tokens_per_chip=1.0)
