"""What the TPU compiler makes of steps with each optimizer: state split over all chips, no work done twice, nothing sent in every round."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import LlamaConfig
from model.parameters import param_shapes
from model.preflight.estimate import MEMORY_MARGIN, Estimate, estimate
from model.preflight.facts import CompileOrder
from model.preflight.hlo import HloCost, analyse
from model.preflight.optimizer_cost import optimizer_cost
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
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=8192,
    gradient_checkpointing="full",
)
AVERAGES = {"ema_beta": 0.999, "skip_bad_steps": True, "clip_update_norm": True, "watch_norms": True}
TRAIN: dict[str, dict[str, Any]] = {
    "adamw": {},
    **{name: {"optimizer": name, **AVERAGES} for name in ("muon", "lion", "adafactor", "sophia")},
    "muon, tensor": {"optimizer": "muon", "tensor_parallel_size": 2},
    "sophia, context": {"optimizer": "sophia", "context_parallel_size": 4},
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
    """A moment that each chip had whole would be 16 times its part."""
    assert compiled[name].argument_bytes == pytest.approx(estimated(name).state_bytes, rel=0.02)


@pytest.mark.parametrize("name", TRAIN)
def test_no_chip_has_all_layers_of_a_weight_in_float32(costs: dict[str, HloCost], name: str) -> None:
    weights = param_shapes(MODEL)["layers"].values()
    stacks = {tuple(sorted(weight.shape)) for weight in weights if len(weight.shape) == 3}
    arrays = {named.array for named in costs[name].arrays if named.array.dtype == "f32"}
    assert {str(array) for array in arrays if tuple(sorted(size for size in array.dims if size > 1)) in stacks} == set()


@pytest.mark.parametrize("name", TRAIN)
def test_weights_are_gathered_in_bfloat16_only(costs: dict[str, HloCost], name: str) -> None:
    gathers = [one for one in costs[name].collectives if one.kind == "all-gather" and one.dtype == "f32"]
    assert sum(one.total_wire_bytes for one in gathers) < 4 * MODEL.hidden_dim * MODEL.hidden_dim / 10


@pytest.mark.parametrize("name", TRAIN)
def test_memory_beside_the_state_is_within_the_estimates_margin(compiled: dict[str, Program], name: str) -> None:
    beside = compiled[name].hbm_bytes - compiled[name].argument_bytes
    assert beside < MEMORY_MARGIN * estimated(name).working_bytes


def test_muon_makes_each_matrix_orthogonal_on_one_chip(costs: dict[str, HloCost]) -> None:
    """Nine of the feed-forward, six of queries and outputs, six of keys and values: a chip has one of each, or zeros."""
    cost, muon, adamw = optimizer_cost(MODEL, ORDERS["muon"].train, CHIPS), costs["muon"], costs["adamw"]
    assert muon.dot_flops - adamw.dot_flops == pytest.approx(cost.flops, rel=0.02)
    assert muon.wire_bytes("all-to-all") - adamw.wire_bytes("all-to-all") == pytest.approx(cost.ici_bytes, rel=0.02)
    more = [muon.wire_bytes(kind) - adamw.wire_bytes(kind) for kind in ("all-reduce", "all-gather", "reduce-scatter")]
    assert sum(more) < 0.01 * cost.ici_bytes


def test_sophia_gathers_the_head_once_to_draw_targets(costs: dict[str, HloCost]) -> None:
    head = 2 * MODEL.hidden_dim * MODEL.padded_vocab_size
    assert costs["sophia"].wire_bytes("all-gather") < 2 * costs["adamw"].wire_bytes("all-gather") + 1.1 * head


def test_each_chip_of_a_sequence_draws_its_own_targets(costs: dict[str, HloCost]) -> None:
    assert costs["sophia, context"].dot_flops == pytest.approx(costs["sophia"].dot_flops, rel=0.02)


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_the_others_send_what_adamw_sends(costs: dict[str, HloCost], name: str) -> None:
    assert costs[name].ici_bytes == pytest.approx(costs["adamw"].ici_bytes, rel=0.02)
