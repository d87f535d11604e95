"""Parameter and FLOP counts against figures worked out apart, and against XLA's own count.

Shape suffixes: B batch, S and T sequence, D hidden width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from model.config import LlamaConfig, RematPolicy
from model.flops import CHIPS, GIB, chip_of, executed_flops_per_token, mfu, num_parameters, train_flops_per_token
from model.parameters import param_shapes
from model.presets import MODELS

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


POLICIES: tuple[RematPolicy, ...] = ("none", "save_all", "save_qkv_attn", "save_attn", "full")
KEPT = {"save_all": ("qkv", "attention", "gate", "up"), "save_qkv_attn": ("qkv", "attention"), "save_attn": ("attention",), "full": ()}
SMALL = LlamaConfig(
    hidden_dim=512, intermediate_dim=1536, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=192, vocab_size=3072, scan_layers=False
)


@pytest.mark.parametrize(
    ("remat", "teraflops"), [("none", 101.35), ("save_all", 103.0), ("save_qkv_attn", 116.2), ("save_attn", 121.1), ("full", 123.2)]
)
def test_executed_flops_of_the_reference_job(remat: RematPolicy, teraflops: float) -> None:
    tokens = 256 * 2048 / 64
    assert executed_flops_per_token(R1, 2048, remat=remat, attention="splash") * tokens == pytest.approx(teraflops * 1e12, rel=5e-4)


def test_executed_flops_of_the_7b_model() -> None:
    assert executed_flops_per_token(SEVEN_B, 2048, remat="full", attention="splash") * 2048 * 2048 / 64 == pytest.approx(3655e12, rel=1e-3)


def test_what_the_attention_kernels_run() -> None:
    # the square: 4 S H K forward; blocks of 512 at 2048 leave 10 of 16; backward 7 matmuls for splash, 5 for flash, 4 for plain
    def without_attention(kind: Any, share: float, passes: float) -> float:
        square = 24 * 4 * 2048 * 16 * 128
        return executed_flops_per_token(R1, 2048, remat="none", attention=kind) - square * share * passes

    linear = train_flops_per_token(R1, 2048) - 3 * 24 * 4 * 2048 * 16 * 128 / 2
    assert without_attention("splash", 10 / 16, 4.5) == pytest.approx(linear)
    assert without_attention("flash", 10 / 16, 3.5) == pytest.approx(linear)
    assert without_attention("plain", 1.0, 3.0) == pytest.approx(linear)


def test_smaller_blocks_waste_less() -> None:
    counts = [executed_flops_per_token(R1, 2048, remat="none", attention="splash", block_size=size) for size in (2048, 512, 128)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[1] == pytest.approx(24 * 4.5 * 4 * 2048 * 2048 * 6 / 16)


def _layer(x_BSD: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    """One decoder layer without norms and rotation, which are no matmuls; activations named as the policies name them."""
    batch, length, _ = x_BSD.shape
    heads, groups, width = SMALL.num_heads, SMALL.num_kv_heads, SMALL.head_size
    qkv = checkpoint_name(x_BSD @ w["qkv"], "qkv")
    q, k, v = jnp.split(qkv, [heads * width, (heads + groups) * width], axis=-1)
    q_BSGRK = q.reshape(batch, length, groups, heads // groups, width)
    k_BTGK, v_BTGK = (t.reshape(batch, length, groups, width) for t in (k, v))
    scores = jnp.einsum("bsgrk,btgk->bgrst", q_BSGRK, k_BTGK) / math.sqrt(width)
    causal = jnp.tril(jnp.ones((length, length), bool))
    values = jnp.einsum("bgrst,btgk->bsgrk", jax.nn.softmax(jnp.where(causal, scores, -1e30)), v_BTGK)
    x_BSD = x_BSD + checkpoint_name(values.reshape(batch, length, heads * width), "attention") @ w["out"]
    gate, up = checkpoint_name(x_BSD @ w["gate"], "gate"), checkpoint_name(x_BSD @ w["up"], "up")
    return x_BSD + (jax.nn.silu(gate) * up) @ w["down"]


def _xla_flops(remat: RematPolicy, *, repeat_head: bool, batch: int = 2, seq_len: int = 128) -> float:
    """What XLA counts for loss and gradients of two unrolled layers and a head."""
    width, inter, head = SMALL.hidden_dim, SMALL.intermediate_dim, SMALL.head_size
    shapes = {
        "qkv": (width, (SMALL.num_heads + 2 * SMALL.num_kv_heads) * head),
        "out": (SMALL.num_heads * head, width),
        "gate": (width, inter),
        "up": (width, inter),
        "down": (inter, width),
    }
    layer = _layer
    if remat != "none":
        layer = jax.checkpoint(_layer, policy=jax.checkpoint_policies.save_only_these_names(*KEPT[remat]))

    def head_loss(x_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array) -> jax.Array:
        logits = x_BSD @ head_DV
        return (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets_BS[..., None], -1)[..., 0]).mean()

    def loss(weights: Any, x_BSD: jax.Array, targets_BS: jax.Array) -> jax.Array:
        for w in weights["layers"]:
            x_BSD = layer(x_BSD, w)
        return (jax.checkpoint(head_loss) if repeat_head else head_loss)(x_BSD, weights["head"], targets_BS)

    abstract = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    weights = {
        "layers": [{name: abstract(*shape) for name, shape in shapes.items()} for _ in range(SMALL.num_layers)],
        "head": abstract(width, SMALL.vocab_size),
    }
    arguments = weights, abstract(batch, seq_len, width), abstract(batch, seq_len, dtype=jnp.int32)
    # a CPU compile merges what is computed again with the first time, which no TPU compile does
    counted = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        .lower(*arguments)
        .compile(compiler_options={"xla_disable_hlo_passes": "cse"})
        .cost_analysis()
    )
    assert counted is not None
    return counted["flops"] / (batch * seq_len)


@pytest.mark.parametrize("remat", POLICIES)
def test_formula_against_xla(remat: RematPolicy) -> None:
    formula = executed_flops_per_token(SMALL, 128, remat=remat, attention="plain")
    assert _xla_flops(remat, repeat_head=False) == pytest.approx(formula, rel=0.01)


def test_a_head_computed_twice_against_xla() -> None:
    formula = executed_flops_per_token(SMALL, 128, remat="save_all", attention="plain", fused_head=False)
    assert _xla_flops("save_all", repeat_head=True) == pytest.approx(formula, rel=0.01)


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
