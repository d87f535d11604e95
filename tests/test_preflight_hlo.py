"""The reader of optimised TPU HLO: small programs written out, and programs that libtpu compiles now."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.preflight.hlo import Collective, HloError, analyse
from model.preflight.hlo_groups import replica_group
from model.preflight.hlo_text import parse_module

CHECKOUT = Path(__file__).resolve().parent.parent
FLAGS: dict[str, str | bool] = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}

# An all-gather split over three fusions, one of which multiplies meanwhile, in a loop of 6; a stack of 6 is sliced in it.
CHAIN = (CHECKOUT / "tests/golden/async_chain.hlo").read_text(encoding="utf-8")


def entry(*instructions: str, before: str = "", partitions: int = 64) -> str:
    """A module whose entry has the parameter %x, f32[64,512], and these instructions."""
    body = "\n".join(f"  {instruction}" for instruction in ("%x = f32[64,512]{1,0} parameter(0)", *instructions))
    return f"HloModule m, num_partitions={partitions}\n{before}\nENTRY %main (x: f32[64,512]) -> f32[64,512] {{\n{body}\n}}\n"


def only(text: str, *, chips_per_slice: int | None = None) -> Collective:
    (collective,) = analyse(text, chips_per_slice=chips_per_slice).collectives
    return collective


def test_a_chain_of_fusions_is_one_asynchronous_collective() -> None:
    cost = analyse(CHAIN)
    (gather,) = cost.collectives
    assert (gather.kind, gather.is_async, gather.times, len(gather.group)) == ("all-gather", True, 6, 64)
    assert gather.bytes == 1024 * 256 * 2
    assert cost.ici_bytes == pytest.approx(6 * 1024 * 256 * 2 * 63 / 64)
    assert cost.all_gather_async_share == 1.0
    assert cost.dot_flops == 6 * 2 * 32 * 1024 * 64
    assert cost.custom_calls == {"AsyncCollectiveStart": 6, "AsyncCollectiveDone": 6}


def test_hbm_bytes_of_the_chain() -> None:
    sliced = 32 * 1024 * 4 + 32 * 1024 * 2  # a row of the stack read, its cast written
    gathered = 1024 * 256 * 2  # written once; the shard lives on the chip
    product = (32 * 1024 + 1024 * 64 + 32 * 64) * 2
    assert analyse(CHAIN).hbm_bytes == 6 * (sliced + gathered + product + 4 * 4)  # and the counter: sliced by, and added to


def test_an_array_read_whole_in_as_many_rounds_as_it_has_rows_is_read_whole() -> None:
    text = CHAIN.replace(
        "dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,32,1024}", "reduce(%s, %i), dimensions={0}, to_apply=%take"
    )
    more = analyse(text).hbm_bytes - analyse(CHAIN).hbm_bytes
    assert more == 6 * 5 * 32 * 1024 * 4


def test_a_chain_that_nothing_starts_is_refused() -> None:
    orphan = CHAIN.replace('"AsyncCollectiveStart"', '"Other"').replace(
        "(%shard), kind=kCustom, calls=%start", "(%shard), kind=kCustom, calls=%done"
    )
    with pytest.raises(HloError, match=r"nothing starts.*in line \d+.*all-gather"):
        analyse(orphan)


SUM = "\n%sum (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n"
SIZE = 64 * 512 * 4


@pytest.mark.parametrize(
    ("instruction", "kind", "is_async", "bytes_", "wire"),
    [
        ("all-reduce(%x), replica_groups=[4,16]<=[64], to_apply=%sum", "all-reduce", False, SIZE, 2 * SIZE * 15 / 16),
        ("all-to-all(%x), replica_groups=[4,16]<=[64], dimensions={0}", "all-to-all", False, SIZE, SIZE * 15 / 16),
        ("all-gather(%x), replica_groups={}, dimensions={0}", "all-gather", False, SIZE * 64, SIZE * 63),
        ("reduce-scatter(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum", "reduce-scatter", False, SIZE, SIZE / 2),
        ("collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", True, SIZE, SIZE),
    ],
)
def test_bytes_on_the_wire(instruction: str, kind: str, is_async: bool, bytes_: float, wire: float) -> None:
    one = only(entry(f"ROOT %c = (f32[64,512]{{1,0}}, f32[64,512]{{1,0}}) {instruction}", before=SUM))
    assert (one.kind, one.is_async, one.bytes, one.wire_bytes, one.dtype, one.network) == (kind, is_async, bytes_, wire, "f32", "ici")


def test_a_fused_all_reduce_that_keeps_one_part_is_a_reduce_scatter() -> None:
    fused = """
%all-reduce-scatter (p: f32[64,512]) -> f32[4,512] {
  %p = f32[64,512]{1,0} parameter(0)
  %i = s32[] constant(0)
  %all = f32[64,512]{1,0} all-reduce(%p), channel_id=1, replica_groups=[4,16]<=[4,16], to_apply=%sum
  ROOT %part = f32[4,512]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={4,512}
}
"""
    one = only(entry("ROOT %f = f32[4,512]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter", before=SUM + fused))
    assert (one.kind, one.wire_bytes) == ("reduce-scatter", SIZE * 15 / 16)


def test_explicit_scatters_share_a_channel_and_count_apart() -> None:
    scatter = "f32[32,512]{1,0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%sum"
    assert len(analyse(entry(f"%r1 = {scatter}", f"ROOT %r2 = {scatter}", before=SUM)).collectives) == 2


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("replica_groups={{0,4,8},{1,5,9}}", (0, 4, 8)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=16,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'a'}", (7, 3)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_replica_groups(groups: str, group: tuple[int, ...]) -> None:
    module = parse_module(entry(f"ROOT %c = f32[64,512]{{1,0}} all-reduce(%x), {groups}", partitions=8))
    assert replica_group(module.entry.root, module.num_partitions) == group


def test_what_the_compiler_says_of_its_algorithm() -> None:
    config = r'backend_config={"collective_algorithm_config":{"emitter":"Rotated","debug":"\nRing{colors:6 phases:3 cores:{4 4 4}}"}}'
    one = only(entry(f"ROOT %c = f32[64,512]{{1,0}} all-reduce(%x), replica_groups={{}}, {config}"))
    assert (one.torus_dimensions, one.colors) == (3, 6)


def test_transfers_between_slices_are_collectives_over_dcn() -> None:
    attributes = '_xla_megascale_target="{1,2,3,4}x{0:63}",_xla_megascale_transfer_type="ALL_REDUCE"'
    send = f"ROOT %s = (f32[64,512], u32[], token[]) send(%x, %t), is_host_transfer=true, frontend_attributes={{{attributes}}}"
    text = entry("%t = token[] after-all()", send)
    one = only(text)
    assert (one.network, one.kind, len(one.group), one.wire_bytes) == ("dcn", "all-reduce", 4, 2 * SIZE * 3 / 4)
    assert analyse(text).ici_bytes == 0
    with pytest.raises(HloError, match="unknown kind 'GOSSIP'"):
        analyse(text.replace("ALL_REDUCE", "GOSSIP"))


def test_groups_across_slices_of_one_program() -> None:
    text = entry("ROOT %c = f32[64,512]{1,0} all-reduce(%x), replica_groups=[32,2]<=[2,32]T(1,0)")
    assert only(text).network == "ici"
    assert only(text, chips_per_slice=32).network == "dcn"
    assert only(text.replace("T(1,0)", "").replace("[2,32]", "[64]"), chips_per_slice=32).network == "ici"


def test_a_window_counts_where_it_meets_data() -> None:
    # 16 windows of 16 over 16 elements, padded by 15: each output meets each element once, as libtpu writes a batch of products
    text = entry(
        "%l = f32[16,128,8]{2,1,0} parameter(1)",
        "%r = f32[16,8,32]{2,1,0} parameter(2)",
        "ROOT %c = f32[16,128,32]{2,1,0} convolution(%l, %r), window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
    )
    meetings = sum(min(out, 15) - max(out - 15, 0) + 1 for out in range(16))
    assert analyse(text).dot_flops == 2 * 128 * 8 * 32 * meetings


@pytest.mark.parametrize(("left", "right", "share"), [("s8", "s8", 1.0), ("bf16", "s8", 0.0), ("bf16", "bf16", 0.0)])
def test_products_of_integers_are_counted_apart(left: str, right: str, share: float) -> None:
    text = entry(
        f"%l = {left}[64,32]{{1,0}} parameter(1)",
        f"%r = {right}[32,16]{{1,0}} parameter(2)",
        "ROOT %d = f32[64,16]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    cost = analyse(text)
    assert cost.dot_flops == 2 * 64 * 32 * 16
    assert cost.int8_flops == cost.phases[0].int8_flops == share * cost.dot_flops


def test_whole_logits_in_any_shape_and_neither_chunks_nor_weights() -> None:
    text = entry(
        "%l = f32[4,64,512]{2,1,0} broadcast(%x), dimensions={1,2}",
        "%flat = bf16[256,512]{1,0} bitcast(%l)",
        "%turned = f32[512,256]{1,0} transpose(%flat), dimensions={1,0}",
        "%chunks = f32[16,20,512]{2,1,0} broadcast(%x), dimensions={1,2}",
        "%other = f32[256,1024]{1,0} broadcast(%x), dimensions={1}",
        "%chunk = f32[64,512]{1,0} slice(%x), slice={[0:64], [0:512]}",
        "%head = f32[1024,512]{1,0} parameter(1)",
        "ROOT %part = f32[2,512,512]{2,1,0} bitcast(%head)",
    )
    cost = analyse(text)
    found = cost.whole_logits((4, 64, 512), {1024})
    assert [named.instruction for named in found] == ["l", "flat", "turned", "chunks"]
    as_many_tokens_as_rows = cost.whole_logits((4, 64, 512), {1024, 256})
    assert [named.instruction for named in as_many_tokens_as_rows] == ["l", "chunks"]
    assert [str(named.array) for named in cost.largest_arrays(1)] == ["f32[2,512,512]"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("HloModule m", "no ENTRY computation in line 1"),
        ("", "no ENTRY computation"),
        (entry("ROOT %c = q7[3]{0} add(%x, %x)"), r"unknown array type 'q7\[3\]\{0\}' in line 5"),
        (entry("what is this"), "not an instruction in line 5 of the HLO: what is this"),
        (entry("ROOT %c = f32[3]{0} fusion(%x), calls=%missing"), "no computation for calls="),
        (entry("ROOT %c = f32[3]{0} all-reduce(%x), replica_groups=gibberish"), "replica groups in an unknown form"),
        (entry("ROOT %c = f32[3]{0} negate(%nothing)"), "operand 0 is not an instruction of %main"),
        (entry("ROOT %c = f32[3]{0} send(%x)"), "a send that is no host transfer"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(HloError, match=problem):
        analyse(text)


def compiled(slice_name: str, layers: int, num_slices: int, *, scan: bool, width: int = 1024, flags: bool = False) -> str:
    """HLO of a small step, compiled for a TPU slice in a child process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
    arguments = [slice_name, layers, num_slices, int(scan), width, int(flags)]
    child = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout


def test_two_slices_compiled_by_libtpu() -> None:
    pytest.importorskip("libtpu")
    cost = analyse(compiled("v4-8", 3, 2, scan=True))
    weights = 3 * 1024 * 1024 * 2  # bytes of all layers in bfloat16
    assert cost.wire_bytes("all-gather") >= weights * 3 / 4  # once a pass, over the four chips of a slice
    assert cost.dcn_bytes == pytest.approx(weights / 4, rel=0.01)  # a chip's quarter of the gradients, all-reduced over two slices
    assert {one.network for one in cost.collectives if one.kind == "all-reduce"} >= {"dcn"}
    assert cost.dot_flops == pytest.approx(3 * 4 * 2 * 512 * 1024 * 1024)  # 512 tokens a chip; forward, again, two backward


@pytest.mark.slow
def test_scanned_and_unrolled_cost_the_same() -> None:
    pytest.importorskip("libtpu")
    scanned, unrolled = (analyse(compiled("v4-128", 4, 1, scan=scan, width=4096, flags=True)) for scan in (True, False))
    assert scanned.ici_bytes == pytest.approx(unrolled.ici_bytes, rel=1e-3)
    assert scanned.dot_flops == pytest.approx(unrolled.dot_flops, rel=0.1)
    assert unrolled.all_gather_async_share > 0.5


def main(slice_name: str, layers: int, num_slices: int, scan: int, width: int, flags: int) -> None:
    """Prints the optimised HLO of a step of stacked matrix products, sharded over all chips of a slice."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from model.slices import slice_named

    topology = topologies.get_topology_desc(**slice_named(slice_name).topology_arguments(num_slices))
    devices = sorted(topology.devices, key=lambda device: device.id)  # slice by slice
    mesh = Mesh(np.array(devices).reshape(num_slices, -1), ("data", "fsdp"))

    @functools.partial(jax.checkpoint, prevent_cse=not scan)  # else the unrolled step keeps the gathered weights
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w.astype(jnp.bfloat16))

    def step(weights: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(weights: jax.Array) -> jax.Array:
            h = x
            if scan:
                h, _ = jax.lax.scan(lambda h, w: (layer(h, w), None), x, weights)
            else:
                for w in weights:
                    h = layer(h, w)
            return (h.astype(jnp.float32) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(weights)
        return weights - gradient, value

    sharded, replicated = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=sharded)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((512 * len(devices), width), jnp.bfloat16, sharding=rows)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(sharded, replicated)).lower(weights, x)
    print(lowered.compile(compiler_options=FLAGS if flags else None).as_text())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
