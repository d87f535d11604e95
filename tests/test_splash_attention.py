"""The TPU kernel, as training calls it, interpreted on CPU against plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import choose_backend, plain_attention
from model.attention_backend import computed_share, splash_block_size
from model.config import LlamaConfig
from model.context_parallel import restore_order, spread_order
from model.partitioning import make_mesh
from model.splash_attention import _kernel, splash_attention

BATCH, SEQ_LEN, HEAD_SIZE = 2, 256, 128


def inputs(num_heads: int = 4, num_kv_heads: int = 2, seq_len: int = SEQ_LEN) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(BATCH, heads, seq_len, HEAD_SIZE) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return q, k, v


def segments(seq_len: int = SEQ_LEN) -> jax.Array:
    """Cuts inside a block, at its border and one token before the end."""
    rows = np.zeros((BATCH, seq_len), np.int32)
    for row, cuts in enumerate(([37, 128, 200], [1, 129, seq_len - 1])):
        for cut in cuts:
            rows[row, cut:] += 1
    return jnp.asarray(rows)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "with_segments", "window"),
    [(4, 2, True, None), (2, 2, False, None), (4, 1, True, None), (2, 1, True, 40), (2, 2, False, 129)],
)
def test_equals_plain_forward_and_backward(num_heads: int, num_kv_heads: int, with_segments: bool, window: int | None) -> None:
    arrays = inputs(num_heads, num_kv_heads)
    ids = segments() if with_segments else None
    weights = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def output_and_gradients(form: object) -> tuple:
        def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = form(*qkv, ids, window=window)
            return (output * weights).sum(), output

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)

    (_, splash), splash_gradients = output_and_gradients(functools.partial(splash_attention, interpret=True))
    (_, plain), plain_gradients = output_and_gradients(plain_attention)
    np.testing.assert_allclose(splash, plain, atol=1e-5)
    for ours, reference in zip(splash_gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-4 * float(jnp.abs(reference).max()))


# a block with tokens of two pieces, and a block a piece
@pytest.mark.parametrize(("seq_len", "window"), [(256, None), (512, None), (256, 50), (512, 200)])
def test_split_over_batch_heads_and_sequence_it_is_the_same(seq_len: int, window: int | None) -> None:
    mesh = make_mesh(context=2, tensor=2, devices=jax.devices()[:8])
    arrays, ids = inputs(seq_len=seq_len), segments(seq_len)
    spread = [spread_order(x, 2, axis=2) for x in arrays]

    attend = functools.partial(splash_attention, mesh=mesh, interpret=True, window=window)
    output = jax.jit(attend)(*spread, spread_order(ids, 2, axis=1))
    np.testing.assert_allclose(restore_order(output, 2, axis=2), plain_attention(*arrays, ids, window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 300, 1025])
@pytest.mark.parametrize(
    ("seq_len", "context", "block"),
    [(2048, 1, 512), (2176, 1, 128), (2048, 4, 256), (2048, 8, 128), (2048, 16, 128), (1152, 3, 128), (4352, 2, 128), (8192, 16, 256)],
)
def test_the_busiest_chip_computes_what_is_counted(seq_len: int, context: int, block: int, window: int | None) -> None:
    assert splash_block_size(seq_len // context, HEAD_SIZE, context=context) == block
    kernel = _kernel(1, seq_len, HEAD_SIZE, context, None, False, window)
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    computed = {int((rows > 0).sum()) for info in infos for rows in np.split(np.asarray(info.block_mask)[0], context)}
    assert max(computed) * block**2 * context / seq_len**2 == pytest.approx(computed_share(seq_len, block, context, window), rel=1e-12)
    if window is None and seq_len // (2 * context) % 128 == 0:
        assert len(computed) == 1, "each chip does the same work"


def test_a_block_of_ones_own_gives_way_where_it_does_not_divide() -> None:
    cases = {
        (1536, 128, 384, 1): 384,
        (1536, 128, 512, 2): 256,
        (1536, 128, 384, 2): 384,
        (1280, 128, 512, 1): 256,
        (2048, 256, None, 1): 256,
    }
    assert {case: splash_block_size(*case) for case in cases} == cases


def test_length_that_blocks_do_not_divide_is_named() -> None:
    q, k, v = (x[:, :, :200] for x in inputs())
    with pytest.raises(ValueError, match=r"200 tokens a chip .* multiple of 128"):
        splash_attention(q, k, v, None)
    with pytest.raises(ValueError, match=r"model.attn_backend='splash' takes sequences in multiples of 128 tokens, not 200"):
        choose_backend(LlamaConfig(attn_backend="splash"), 200, "tpu")
    with pytest.raises(ValueError, match=r"model.attn_backend='splash' is a kernel for TPUs, and devices here are of kind cpu"):
        choose_backend(LlamaConfig(attn_backend="splash"), 256, "cpu")
    with pytest.raises(ValueError, match=r"use_flash_attention=False means the plain form, and attn_backend='splash' names another"):
        LlamaConfig(attn_backend="splash", use_flash_attention=False)


@pytest.mark.parametrize(
    ("changes", "seq_len", "platform", "chosen"),
    [
        ({}, 2048, "tpu", "splash"),
        ({}, 2048, "cpu", "flash"),
        ({}, 384, "cpu", "plain"),
        ({}, 200, "tpu", "plain"),
        ({"attn_backend": "flash"}, 512, "tpu", "flash"),
        ({"use_flash_attention": False}, 2048, "tpu", "plain"),
    ],
)
def test_choice_by_device_and_length(changes: dict[str, object], seq_len: int, platform: str, chosen: str) -> None:
    assert choose_backend(LlamaConfig().model_copy(update=changes), seq_len, platform) == chosen
