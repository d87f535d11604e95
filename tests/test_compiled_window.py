"""What the TPU compiler makes of attention in a window: kernels whose tables have the blocks of the window and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model.attention_backend import attention_block_size, computed_share
from model.config import LlamaConfig
from model.preflight.facts import CompileOrder
from model.preflight.hlo import analyse
from model.train_config import SimpleTrainConfig
from tests.tpu_programs import compiled_programs

pytestmark = pytest.mark.slow

LENGTH, WINDOW, LAYERS = 8192, 1024, 2
MODEL = LlamaConfig(
    seq_len=LENGTH,
    sliding_window=WINDOW,
    hidden_dim=1024,
    intermediate_dim=3072,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=2048,
    gradient_checkpointing="full",
)
TRAIN = SimpleTrainConfig(train_batch_size=16, num_train_steps=10, learning_rate=1e-3, accelerator_type="v5p-32")


def test_the_kernels_have_the_blocks_of_the_window_and_the_segments(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    wanted = CompileOrder(model=MODEL, train=TRAIN, slice_name="v5p-32", num_slices=1, compiler_options={})
    text = compiled_programs({"window": wanted}, tmp_path)[0]["window"].text
    block = attention_block_size(MODEL, "splash", LENGTH)
    blocks = LENGTH // block
    across = WINDOW // block + 1  # of keys, for the queries of one block
    tables = set(re.findall(r"\bs8\[1,(\d+),(\d+)\]", text))  # what a kernel does with each block: the last two of its grid
    assert tables == {(str(blocks), str(across)), (str(across), str(blocks))}
    # The formula counts these places, less those before the first token of the sequence.
    assert computed_share(LENGTH, block, window=WINDOW) * blocks**2 == blocks * across - sum(range(1, across))
    assert analyse(text).custom_calls["tpu_custom_call"] == 4 * LAYERS  # forward, again for the backward pass, dq, dkv
    assert {"splash_mha_fwd_segmented", "splash_mha_dq_segmented", "splash_mha_dkv_segmented"} <= set(
        re.findall(r"splash_mha_(?:fwd|dq|dkv)_segmented", text)
    )
