"""Parameter and FLOP counts against figures worked out apart, and against the products that training makes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from model.attention_backend import choose_backend
from model.config import REMAT_POLICIES, AttentionBackend, LlamaConfig, RematPolicy
from model.flops import CHIPS, GIB, chip_of, executed_flops_per_token, mfu, num_parameters, train_flops_per_token
from model.parameters import param_shapes
from model.presets import MODELS
from model.train_config import SimpleTrainConfig
from model.train_step import loss_sums
from tests.counted_products import product_flops

R1 = LlamaConfig(seq_len=2048, hidden_dim=2048, intermediate_dim=8192, num_heads=16, num_kv_heads=16, num_layers=24, vocab_size=128_256)
SEVEN_B = LlamaConfig(seq_len=2048, hidden_dim=4096, intermediate_dim=11008, num_layers=32, vocab_size=128_256)


@pytest.mark.parametrize(("config", "parameters"), [(R1, 2.136e9), (SEVEN_B, 7.527e9)])
def test_parameters_of_the_reference_models(config: LlamaConfig, parameters: float) -> None:
    assert num_parameters(config) == pytest.approx(parameters, rel=5e-4)


def test_parameters_of_llama_3_2_1b() -> None:
    assert num_parameters(MODELS["3.2-1b"].with_vocab(128_256)) == 1_235_814_400


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_parameter_table(tied: bool) -> None:
    config = LlamaConfig(
        hidden_dim=32, intermediate_dim=80, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=128, tie_word_embeddings=tied
    )
    assert num_parameters(config) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))


def test_flops_of_the_reference_job() -> None:
    # 97.0 TFLOP for each of 64 chips and step of 256 sequences with causal attention at half; 102.0 with the whole square
    tokens = 256 * 2048 / 64
    assert train_flops_per_token(R1, 2048) * tokens == pytest.approx(97.0e12, rel=2e-3)
    assert train_flops_per_token(R1, 2048, full_attention=True) * tokens == pytest.approx(102.0e12, rel=2e-3)


def test_an_open_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size is unset"):
        num_parameters(LlamaConfig())


SMALL = LlamaConfig(
    hidden_dim=16,
    intermediate_dim=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=60,
    pad_vocab_to_multiple_of=16,
    cross_entropy_block_size=128,
)


@pytest.mark.parametrize(
    ("remat", "teraflops"), [("none", 101.35), ("save_all", 103.0), ("save_qkv_attn", 116.2), ("save_attn", 121.1), ("full", 123.2)]
)
def test_executed_flops_of_the_reference_job(remat: RematPolicy, teraflops: float) -> None:
    tokens = 256 * 2048 / 64
    assert executed_flops_per_token(R1, 2048, remat=remat, attention="splash") * tokens == pytest.approx(teraflops * 1e12, rel=5e-4)


def test_executed_flops_of_the_7b_model() -> None:
    assert executed_flops_per_token(SEVEN_B, 2048, remat="full", attention="splash") * 2048 * 2048 / 64 == pytest.approx(3655e12, rel=1e-3)


@pytest.mark.parametrize(
    ("attention", "context", "share", "passes"),
    [
        # blocks of 512 at 2048 leave 10 of 16, of 256 as flash and the pieces of 4 chips have them 9 of 16
        ("splash", 1, 10 / 16, 4.5),
        ("splash", 4, 9 / 16, 4.5),
        ("splash", 16, 1.0, 4.5),  # one block of 128 is all that a chip has: the one with the last piece needs all keys
        ("flash", 1, 9 / 16, 3.5),
        ("plain", 1, 1.0, 3.0),
        # nobody splits these along the sequence
        ("flash", 4, 4 * 9 / 16, 3.5),
        ("plain", 4, 4.0, 3.0),
    ],
)
def test_what_the_attention_kernels_run(attention: AttentionBackend, context: int, share: float, passes: float) -> None:
    # the square: 4 S H K forward; backward 7 matmuls for splash, 5 for flash, 4 for plain
    square = 24 * 4 * 2048 * 16 * 128
    without_attention = train_flops_per_token(R1, 2048) - 3 * square / 2
    executed = executed_flops_per_token(R1, 2048, remat="none", attention=attention, context=context)
    assert executed - square * share * passes == pytest.approx(without_attention)


def test_smaller_blocks_waste_less() -> None:
    counts = [executed_flops_per_token(R1, 2048, remat="none", attention="splash", block_size=size) for size in (2048, 512, 128)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[1] == pytest.approx(24 * 4.5 * 4 * 2048 * 2048 * 6 / 16)


def test_a_window_leaves_a_band_of_the_square() -> None:
    def attention(window: int | None, **convention: bool) -> float:
        windowed = R1.model_copy(update={"sliding_window": window})
        without = 3 * (24 * 2 * (2048 * 128 * 64 + 3 * 2048 * 8192) + 2 * 2048 * 128_256)
        return (train_flops_per_token(windowed, 2048, **convention) - without) / (3 * 24 * 4 * 2048 * 16 * 128)

    assert attention(None) == attention(2048) == attention(4096) == pytest.approx(0.5)
    assert attention(512) == pytest.approx(sum(min(s + 0.5, 512) for s in range(2048)) / 2048**2, rel=1e-3)
    assert attention(512, full_attention=True) == pytest.approx(0.25)
    windowed = R1.model_copy(update={"sliding_window": 512})
    executed = [executed_flops_per_token(model, 2048, remat="none", attention="splash") for model in (R1, windowed)]
    assert executed[0] - executed[1] == pytest.approx(24 * 4.5 * 4 * 2048 * 2048 * 3 / 16)  # of ten blocks of 512 three are outside


@pytest.mark.slow
def test_the_formula_counts_the_blocks_of_a_window() -> None:
    changes = {"gradient_checkpointing": "none", "attn_backend": "flash", "sliding_window": 130, "num_layers": 1}
    _check_formula(SMALL.model_copy(update=changes))


@pytest.mark.parametrize("attention", ["plain", "flash"])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_the_formula_is_the_count_of_the_products_that_training_makes(remat: RematPolicy, attention: AttentionBackend) -> None:
    _check_formula(SMALL.model_copy(update={"gradient_checkpointing": remat, "attn_backend": attention}))


def _check_formula(config: LlamaConfig) -> None:
    length, train = 512, SimpleTrainConfig(train_batch_size=1, num_train_steps=1, learning_rate=1e-3)
    attention = choose_backend(config, length, "cpu")
    ids = jnp.zeros((1, length), jnp.int32)
    batch = {"tokens": ids, "targets": ids, "segment_ids": ids, "positions": ids, "loss_weights": jnp.ones((1, length))}
    params = jax.tree.map(lambda array: jnp.ones(array.shape), param_shapes(config))
    gradient = jax.grad(lambda params: loss_sums(params, batch, config, train, None).loss)
    formula = executed_flops_per_token(config, length, remat=config.remat, attention=attention)
    assert product_flops(gradient, params) == formula * length


@pytest.mark.parametrize(
    ("device_kind", "name"), [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e")]
)
def test_chips_by_device_kind(device_kind: str, name: str) -> None:
    assert chip_of(device_kind) is CHIPS[name]


def test_other_devices_are_no_chip() -> None:
    assert chip_of("cpu") is None
    assert chip_of("NVIDIA H100") is None


def test_chips_are_within_their_nominal_limits() -> None:
    nominal_hbm = {"v4": 32, "v5e": 16, "v5p": 96, "v6e": 32}
    nominal_ici = {"v4": 300e9, "v5e": 200e9, "v5p": 600e9, "v6e": 400e9}  # one way, all links, as Google prints them
    for name, chip in CHIPS.items():
        assert 0.96 * nominal_hbm[name] <= chip.usable_hbm_bytes / GIB < nominal_hbm[name]
        assert 0.85 * nominal_ici[name] <= chip.ici_bytes_per_second <= nominal_ici[name]


def test_mfu_in_both_conventions() -> None:
    tokens_per_second = 64 * 15_000.0
    causal = mfu(train_flops_per_token(R1, 2048) * tokens_per_second, CHIPS["v4"], num_chips=64)
    full = mfu(train_flops_per_token(R1, 2048, full_attention=True) * tokens_per_second, CHIPS["v4"], num_chips=64)
    assert causal == pytest.approx(0.646, abs=1e-3)
    assert full / causal == pytest.approx(1.051, abs=1e-3)
