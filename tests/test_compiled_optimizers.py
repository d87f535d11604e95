"""What the TPU compiler makes of steps with each optimizer: state split over all chips, no work done twice, nothing sent in every round."""

from __future__ import annotations

import math
from typing import Any

import pytest

from model.config import LlamaConfig
from model.preflight.estimate import MEMORY_MARGIN, Estimate, estimate
from model.preflight.facts import CompileOrder
from model.preflight.hlo import HloCost, analyse
from model.preflight.settings import Fixed, Job, single_setting
from model.slices import slice_named
from model.train_config import SimpleTrainConfig
from tests.tpu_programs import Program, compiled_programs

pytestmark = pytest.mark.slow

CHIPS = slice_named("v4-32").num_chips
MODEL = LlamaConfig(
    seq_len=1024,
    hidden_dim=1024,
    intermediate_dim=3072,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=8192,
    gradient_checkpointing="full",
)
AVERAGES = {"ema_beta": 0.999, "skip_bad_steps": True, "clip_update_norm": True, "watch_norms": True}
TRAIN: dict[str, dict[str, Any]] = {
    "adamw": {},
    **{name: {"optimizer": name, **AVERAGES} for name in ("muon", "lion", "adafactor", "sophia")},
}


def order(**train: Any) -> CompileOrder:
    config = SimpleTrainConfig(train_batch_size=CHIPS, num_train_steps=10, learning_rate=1e-3, accelerator_type="v4-32", **train)
    return CompileOrder(model=MODEL, train=config, slice_name="v4-32", num_slices=1, compiler_options={})


ORDERS = {name: order(**train) for name, train in TRAIN.items()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    pytest.importorskip("libtpu")
    return compiled_programs(ORDERS, tmp_path_factory.mktemp("programs"))[0]


@pytest.fixture(scope="module")
def costs(compiled: dict[str, Program]) -> dict[str, HloCost]:
    return {name: analyse(program.text) for name, program in compiled.items()}


def estimated(name: str) -> Estimate:
    job = Job(name=name, model=MODEL, train=ORDERS[name].train)
    return estimate(job, slice_named("v4-32"), single_setting(job, Fixed()))


@pytest.mark.parametrize("name", TRAIN)
def test_a_chip_holds_its_part_of_the_state(compiled: dict[str, Program], name: str) -> None:
    """One moment replicated would be 4 MB for each million weights, on 16 times as little."""
    assert compiled[name].argument_bytes == pytest.approx(estimated(name).state_bytes, rel=0.02)


@pytest.mark.parametrize("name", TRAIN)
def test_no_array_is_a_whole_weight_in_float32(costs: dict[str, HloCost], name: str) -> None:
    """Gradients and gathered weights are in bfloat16, a layer at a time; all else of a chip's is a part."""
    smallest = MODEL.num_layers * MODEL.hidden_dim * MODEL.num_kv_heads * MODEL.head_size
    whole = {
        named.instruction: str(named.array) for named in costs[name].arrays if _is_large(named.array.dims, named.array.dtype, smallest)
    }
    assert whole == {}


def _is_large(dims: tuple[int, ...], dtype: str, smallest: int) -> bool:
    return dtype == "f32" and math.prod(dims) >= smallest and MODEL.vocab_size not in dims


@pytest.mark.parametrize("name", TRAIN)
def test_memory_beside_the_state_is_within_the_estimates_margin(compiled: dict[str, Program], name: str) -> None:
    beside = compiled[name].hbm_bytes - compiled[name].argument_bytes
    print(name, beside, estimated(name).working_bytes)
    assert beside < MEMORY_MARGIN * estimated(name).working_bytes


def test_muon_makes_each_matrix_orthogonal_on_one_chip(costs: dict[str, HloCost]) -> None:
    """Six matrices of the feed-forward, four of queries and outputs, four of keys and values: every chip has one of each or none."""
    width, keys = MODEL.hidden_dim, MODEL.num_kv_heads * MODEL.head_size
    flops = 0.0
    for rows, columns in ((MODEL.intermediate_dim, width), (width, width), (width, keys)):
        short, long = sorted((rows, columns))
        flops += 5 * (4 * short**2 * long + 2 * short**3)
    assert costs["muon"].dot_flops - costs["adamw"].dot_flops == pytest.approx(flops, rel=0.02)
    sent = 4 * 2 * CHIPS * (MODEL.intermediate_dim * width + width * width + width * keys) / CHIPS  # there and back, zeros too
    more = {kind: costs["muon"].wire_bytes(kind) - costs["adamw"].wire_bytes(kind) for kind in ("all-to-all", "all-reduce", "all-gather")}
    assert more["all-to-all"] == pytest.approx(sent, rel=0.1)
    assert more["all-reduce"] + more["all-gather"] < 0.01 * sent


def test_sophia_gathers_the_head_once_to_draw_targets(costs: dict[str, HloCost]) -> None:
    head = 2 * MODEL.hidden_dim * MODEL.padded_vocab_size
    assert costs["sophia"].wire_bytes("all-gather") < 2 * costs["adamw"].wire_bytes("all-gather") + 1.1 * head


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_the_others_send_what_adamw_sends(costs: dict[str, HloCost], name: str) -> None:
    assert costs[name].ici_bytes == pytest.approx(costs["adamw"].ici_bytes, rel=0.02)
