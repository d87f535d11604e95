"""Flash attention against the plain form, and the plain form against a loop over tokens."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import attention, flash_attention, plain_attention
from model.attention_backend import flash_block_size
from model.config import LlamaConfig


def inputs(seq_len: int, *, num_heads: int = 4, num_kv_heads: int = 2, head_size: int = 8) -> tuple[jax.Array, ...]:
    q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(q_key, (2, num_heads, seq_len, head_size))
    k = jax.random.normal(k_key, (2, num_kv_heads, seq_len, head_size))
    return q, k, jax.random.normal(v_key, (2, num_kv_heads, seq_len, head_size))


def segments(seq_len: int) -> jax.Array:
    """Two rows cut at different places, one cut inside a block, ids in no order."""
    cuts = np.array([[0.0, 0.1, 0.52, 0.9], [0.0, 0.3, 0.31, 0.77]]) * seq_len
    return jnp.asarray([[[4, 1, 9, 2][np.searchsorted(row, t, side="right") - 1] for t in range(seq_len)] for row in cuts], jnp.int32)


def test_plain_attention_is_a_softmax_over_earlier_tokens_of_the_segment() -> None:
    q, k, v = (np.asarray(x, np.float64) for x in inputs(12))
    ids = np.asarray(segments(12))
    expected = np.zeros(q.shape)
    for b, h, s in np.ndindex(*q.shape[:3]):
        seen = [t for t in range(s + 1) if ids[b, t] == ids[b, s]]
        weights = np.exp([q[b, h, s] @ k[b, h // 2, t] / math.sqrt(8) for t in seen])
        expected[b, h, s] = weights @ v[b, h // 2, seen] / weights.sum()
    np.testing.assert_allclose(plain_attention(*inputs(12), segments(12)), expected, atol=1e-6)


def test_a_window_holds_the_token_itself_and_those_before_it() -> None:
    q, k, v = inputs(12)
    visible = plain_attention(q, k, jnp.broadcast_to(jnp.eye(12), (2, 2, 12, 12)), window=4) > 0
    expected = [[s - 4 < t <= s for t in range(12)] for s in range(12)]
    np.testing.assert_array_equal(visible, np.broadcast_to(expected, visible.shape))
    np.testing.assert_array_equal(plain_attention(q, k, v, window=12), plain_attention(q, k, v))
    config = LlamaConfig(hidden_dim=32, num_heads=4, num_kv_heads=2, sliding_window=4)
    np.testing.assert_array_equal(attention(q, k, v, None, config), plain_attention(q, k, v, window=4))


@pytest.mark.parametrize(("window", "with_segments"), [(1, False), (100, True), (128, False), (129, True), (300, True), (511, False)])
def test_flash_equals_plain_in_a_window(window: int, with_segments: bool) -> None:
    arrays, ids = inputs(512), segments(512) if with_segments else None
    weights = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def output_and_gradients(form: Callable[..., jax.Array]) -> tuple:
        def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = form(*qkv, ids, window=window)
            return (output * weights).sum(), output

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)

    (_, flash), flash_gradients = output_and_gradients(flash_attention)
    (_, plain), plain_gradients = output_and_gradients(plain_attention)
    np.testing.assert_allclose(flash, plain, atol=2e-6)
    scale = max(float(jnp.abs(gradient).max()) for gradient in plain_gradients)  # of one token alone, those of q and k are zero
    for ours, reference in zip(flash_gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5 * scale)


@pytest.mark.parametrize(("with_segments", "num_kv_heads", "seq_len"), [(True, 2, 512), (True, 4, 384), (False, 1, 512), (True, 1, 2048)])
def test_flash_equals_plain_forward_and_backward(with_segments: bool, num_kv_heads: int, seq_len: int) -> None:
    arrays = inputs(seq_len, num_kv_heads=num_kv_heads)
    ids = segments(seq_len) if with_segments else None
    weights = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def output_and_gradients(form: Callable[..., jax.Array]) -> tuple:
        return jax.jit(jax.value_and_grad(lambda *qkv: (form(*qkv, ids) * weights).sum(), argnums=(0, 1, 2)))(*arrays)

    np.testing.assert_allclose(flash_attention(*arrays, ids), plain_attention(*arrays, ids), atol=2e-6)
    (_, flash_gradients), (_, plain_gradients) = output_and_gradients(flash_attention), output_and_gradients(plain_attention)
    for flash, plain in zip(flash_gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(flash, plain, atol=1e-5 * float(jnp.abs(plain).max()))


def test_a_block_that_does_not_divide_gives_way_to_one_that_does() -> None:
    assert [flash_block_size(*case) for case in ((512,), (2048,), (2176,), (640, 512), (1024, 512), (520, 512))] == [
        128, 256, 128, 128, 512, None
    ]  # fmt: skip
    arrays = inputs(640)
    np.testing.assert_allclose(flash_attention(*arrays, block_size=512), plain_attention(*arrays), atol=2e-6)


def test_the_gradient_of_flash_is_made_in_five_products() -> None:
    q, k, v = inputs(512)
    gradient = jax.grad(lambda *qkv: flash_attention(*qkv).sum(), argnums=(0, 1, 2))
    products = str(jax.make_jaxpr(gradient)(q, k, v)).count("dot_general")
    forward = str(jax.make_jaxpr(flash_attention)(q, k, v)).count("dot_general")
    assert (forward, products - forward) == (2, 5)


def test_flash_never_holds_the_square_of_scores() -> None:
    arrays = inputs(1024)
    compiled = jax.jit(jax.grad(lambda *qkv: flash_attention(*qkv, None, 128).sum(), argnums=(0, 1, 2))).lower(*arrays).compile()
    assert "1024,1024]" not in compiled.as_text()
    plain = jax.jit(jax.grad(lambda *qkv: plain_attention(*qkv).sum(), argnums=(0, 1, 2))).lower(*arrays).compile()
    assert "1024,1024]" in plain.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes / 3


def test_flash_refuses_a_sequence_that_blocks_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        flash_attention(*inputs(520))


@pytest.mark.parametrize(("seq_len", "switch", "flash"), [(512, True, True), (512, False, False), (384, True, False), (1100, True, False)])
def test_choice_of_the_form(seq_len: int, switch: bool, flash: bool) -> None:
    config = LlamaConfig(hidden_dim=32, num_heads=4, num_kv_heads=2, use_flash_attention=switch)
    program = str(jax.make_jaxpr(lambda *qkv: attention(*qkv, None, config))(*inputs(seq_len)))
    assert ("while" in program) == flash


def test_bfloat16_in_bfloat16_out() -> None:
    arrays = [x.astype(jnp.bfloat16) for x in inputs(1024)]
    flash, plain = flash_attention(*arrays), plain_attention(*arrays)
    assert flash.dtype == plain.dtype == jnp.bfloat16
    np.testing.assert_allclose(flash.astype(jnp.float32), plain.astype(jnp.float32), atol=0.03)
