"""What the TPU compiler makes of small train steps: how much it multiplies, and which arrays it keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from model.config import LlamaConfig, RematPolicy
from model.flops import executed_flops_per_token
from model.preflight.facts import CompileOrder
from model.preflight.hlo import analyse
from model.slices import slice_named
from model.train_config import SimpleTrainConfig
from tests.tpu_programs import Program, compiled_programs

SMALL = LlamaConfig(
    seq_len=1024, hidden_dim=1024, intermediate_dim=3072, num_layers=2, num_heads=8, num_kv_heads=4, vocab_size=2048, scan_layers=False
)
UNROLLED: tuple[RematPolicy, ...] = ("save_all", "full")


def order(slice_name: str, batch: int, model: dict[str, Any], **train: Any) -> CompileOrder:
    config = SimpleTrainConfig(train_batch_size=batch, num_train_steps=10, learning_rate=1e-3, accelerator_type=slice_name, **train)
    return CompileOrder(model=SMALL.model_copy(update=model), train=config, slice_name=slice_name, num_slices=1, compiler_options={})


ORDERS = {
    **{remat: order("v4-8", 4, {"gradient_checkpointing": remat, "attn_backend": "plain", "seq_len": 512}) for remat in UNROLLED},
    "context": order("v4-32", 12, {"gradient_checkpointing": "save_all", "scan_layers": True}, context_parallel_size=4),
}


def compiled(name: str, directory: Path) -> tuple[Program, str]:
    """One of ORDERS, and what the compiler said."""
    pytest.importorskip("libtpu")
    programs, said = compiled_programs({name: ORDERS[name]}, directory)
    return programs[name], said


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["save_all", "full"])
def test_the_formula_is_what_the_compiled_step_multiplies(remat: RematPolicy, tmp_path: Path) -> None:
    (program, _), made = compiled(remat, tmp_path), ORDERS[remat]
    tokens = made.train.batch_schedule.largest * made.model.seq_len / slice_named(made.slice_name).num_chips
    formula = executed_flops_per_token(made.model, made.model.seq_len, remat=remat, attention="plain") * tokens
    assert analyse(program.text).dot_flops == pytest.approx(formula, rel=0.01)
    assert program.flops == pytest.approx(formula, rel=0.01)


def test_no_chip_has_the_hidden_states_of_the_whole_batch(tmp_path: Path) -> None:
    (program, said), made = compiled("context", tmp_path), ORDERS["context"]
    whole = made.train.batch_schedule.largest * made.model.seq_len * made.model.hidden_dim
    sizes = {array.array.dims: array.instruction for array in analyse(program.text).arrays}
    assert {dims: name for dims, name in sizes.items() if math.prod(dims) == whole} == {}
    assert "rematerialization" not in said.lower()
