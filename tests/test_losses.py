"""The fused loss against a plain float64 computation, and the promise that full logits never exist."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.losses import LossSums, next_token_loss
from model.partitioning import make_mesh

BATCH, SEQ_LEN, HIDDEN, VOCAB = 8, 12, 16, 40


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.0, 2.0, (BATCH, SEQ_LEN)) * (rng.random((BATCH, SEQ_LEN)) > 0.3)
    return {
        "hidden": rng.normal(size=(BATCH, SEQ_LEN, HIDDEN)),
        "head": rng.normal(size=(HIDDEN, VOCAB)),
        "targets": rng.integers(0, VOCAB, (BATCH, SEQ_LEN)),
        "weights": weights,
    }


def reference(arrays: dict[str, np.ndarray], z_loss_weight: float) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Sums, and gradients of the loss in hidden states and head, in float64."""
    logits = arrays["hidden"] @ arrays["head"]
    lse = np.log(np.exp(logits).sum(-1))
    one_hot = np.eye(VOCAB)[arrays["targets"]]
    ce, z, w = lse - (logits * one_hot).sum(-1), z_loss_weight * lse**2, arrays["weights"]
    sums = {"loss": (w * (ce + z)).sum(), "cross_entropy": (w * ce).sum(), "z_loss": (w * z).sum(), "weight": w.sum()}
    softmax = np.exp(logits - lse[..., None])
    d_logits = w[..., None] * (softmax * (1 + 2 * z_loss_weight * lse[..., None]) - one_hot)
    return sums, d_logits @ arrays["head"].T, np.einsum("bsd,bsv->dv", arrays["hidden"], d_logits)


def fused(arrays: dict[str, np.ndarray], **settings: object) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = next_token_loss(hidden, head, jnp.asarray(arrays["targets"]), jnp.asarray(arrays["weights"]), **settings)
        return sums.loss, sums

    inputs = jnp.asarray(arrays["hidden"], jnp.float32), jnp.asarray(arrays["head"], jnp.float32)
    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*inputs)
    return sums, gradients


MESHES = {
    "one device": None,
    "fsdp 8": {},
    "tensor 8": {"tensor": 8},
    "tensor 2, fsdp 4": {"tensor": 2},
    "data 2, fsdp 2, tensor 2": {"data": 2, "tensor": 2},
    "data 8": {"data": 8},
}


@pytest.mark.parametrize(
    ("mesh", "chunk_size", "z_loss_weight"), [(mesh, 7, 0.05) for mesh in MESHES] + [("one device", 1024, 0.0), ("fsdp 8", 1024, 0.0)]
)
def test_sums_and_gradients(arrays: dict[str, np.ndarray], mesh: str, chunk_size: int, z_loss_weight: float) -> None:
    sizes = MESHES[mesh]
    sums, (d_hidden, d_head) = fused(
        arrays, z_loss_weight=z_loss_weight, chunk_size=chunk_size, mesh=None if sizes is None else make_mesh(**sizes)
    )
    expected, expected_d_hidden, expected_d_head = reference(arrays, z_loss_weight)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=2e-6)
    np.testing.assert_allclose(d_hidden, expected_d_hidden, atol=2e-6 * np.abs(expected_d_hidden).max())
    np.testing.assert_allclose(d_head, expected_d_head, atol=2e-6 * np.abs(expected_d_head).max())


def test_head_that_fsdp_does_not_divide_stays_whole(arrays: dict[str, np.ndarray]) -> None:
    narrow = {**arrays, "hidden": arrays["hidden"][..., :15], "head": arrays["head"][:15]}
    _, (d_hidden, d_head) = fused(narrow, z_loss_weight=0.1, chunk_size=5, mesh=make_mesh())
    _, expected_d_hidden, expected_d_head = reference(narrow, 0.1)
    np.testing.assert_allclose(d_hidden, expected_d_hidden, atol=1e-5)
    np.testing.assert_allclose(d_head, expected_d_head, atol=1e-4)


def test_value_without_gradient_is_the_same(arrays: dict[str, np.ndarray]) -> None:
    settings = {"z_loss_weight": 0.01, "chunk_size": 10}
    with_gradient, _ = fused(arrays, **settings)
    plain = next_token_loss(
        jnp.asarray(arrays["hidden"], jnp.float32),
        jnp.asarray(arrays["head"], jnp.float32),
        jnp.asarray(arrays["targets"]),
        jnp.asarray(arrays["weights"]),
        **settings,
    )
    np.testing.assert_allclose(plain, with_gradient, rtol=1e-6)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in plain)


def test_gradient_of_a_mean_and_through_a_tied_embedding(arrays: dict[str, np.ndarray]) -> None:
    hidden, targets, weights = (jnp.asarray(arrays[name]) for name in ("hidden", "targets", "weights"))

    def tied(embed: jax.Array, fused_head: bool) -> jax.Array:
        x = (hidden + embed[targets[:, ::-1]]).astype(jnp.float32)
        if fused_head:
            sums = next_token_loss(x, embed.T, targets, weights, z_loss_weight=0.01, chunk_size=16)
            return sums.loss / sums.weight
        lse = jax.nn.logsumexp(x @ embed.T, axis=-1)
        target_logit = jnp.take_along_axis(x @ embed.T, targets[..., None], -1)[..., 0]
        return (weights * (lse - target_logit + 0.01 * lse**2)).sum() / weights.sum()

    embed = jnp.asarray(arrays["head"].T, jnp.float32)
    np.testing.assert_allclose(jax.grad(tied)(embed, True), jax.grad(tied)(embed, False), atol=1e-6)


def test_only_the_loss_is_differentiable(arrays: dict[str, np.ndarray]) -> None:
    def logged(hidden: jax.Array) -> jax.Array:
        sums = next_token_loss(
            hidden,
            jnp.asarray(arrays["head"]),
            jnp.asarray(arrays["targets"]),
            jnp.asarray(arrays["weights"]),
            z_loss_weight=1.0,
            chunk_size=8,
        )
        return sums.cross_entropy + sums.z_loss + sums.weight

    np.testing.assert_array_equal(jax.grad(logged)(jnp.asarray(arrays["hidden"])), 0.0)


def test_bfloat16_hidden_states_keep_float32_sums(arrays: dict[str, np.ndarray]) -> None:
    rounded = {**arrays, "hidden": np.asarray(jnp.asarray(arrays["hidden"], jnp.bfloat16), np.float64)}

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return next_token_loss(
            hidden, head, jnp.asarray(arrays["targets"]), jnp.asarray(arrays["weights"]), z_loss_weight=0.0, chunk_size=32
        ).loss

    value, (d_hidden, d_head) = jax.value_and_grad(loss, argnums=(0, 1))(
        jnp.asarray(rounded["hidden"], jnp.bfloat16), jnp.asarray(arrays["head"], jnp.float32)
    )
    expected, expected_d_hidden, _ = reference(rounded, 0.0)
    assert value.dtype == jnp.float32
    assert d_hidden.dtype == jnp.bfloat16
    assert d_head.dtype == jnp.float32
    np.testing.assert_allclose(value, expected["loss"], rtol=5e-3)
    np.testing.assert_allclose(d_hidden.astype(jnp.float32), expected_d_hidden, atol=0.03 * np.abs(expected_d_hidden).max())


def test_huge_logits_stay_finite() -> None:
    hidden, head = jnp.full((1, 2, 4), 100.0), jnp.eye(4, 8) * 100.0
    sums = next_token_loss(hidden, head, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)), z_loss_weight=0.0, chunk_size=2)
    np.testing.assert_allclose(sums.cross_entropy, 2 * math.log(4), rtol=1e-3)


@pytest.mark.parametrize("target", [-1, VOCAB])
@pytest.mark.parametrize("mesh", [None, {"tensor": 8}])
def test_target_outside_the_vocabulary_is_nan_unless_it_has_no_weight(
    arrays: dict[str, np.ndarray], target: int, mesh: dict | None
) -> None:
    settings = {"z_loss_weight": 0.0, "chunk_size": 16, "mesh": None if mesh is None else make_mesh(**mesh)}
    targets, weights = arrays["targets"].copy(), arrays["weights"].copy()
    targets[0, 0], weights[0, 0] = target, 1.0
    assert jnp.isnan(fused({**arrays, "targets": targets, "weights": weights}, **settings)[0].loss)
    weights[0, 0] = 0.0
    assert jnp.isfinite(fused({**arrays, "targets": targets, "weights": weights}, **settings)[0].loss)


@pytest.mark.parametrize("mesh", [None, {}, {"tensor": 2}])
def test_full_logits_never_exist(mesh: dict | None) -> None:
    batch, seq_len, hidden, vocab = 8, 64, 8, 256

    def loss(x: jax.Array, head: jax.Array) -> jax.Array:
        zeros = jnp.zeros((batch, seq_len), jnp.int32)
        settings = {"z_loss_weight": 1e-4, "chunk_size": 16, "mesh": None if mesh is None else make_mesh(**mesh)}
        return next_token_loss(x, head, zeros, jnp.ones((batch, seq_len)), **settings).loss

    arrays = jnp.ones((batch, seq_len, hidden)), jnp.ones((hidden, vocab))
    for function in (loss, jax.grad(loss, argnums=(0, 1))):
        program = jax.jit(function).lower(*arrays).compile().as_text()
        sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)]
        assert 16 * vocab // 2 in sizes or 16 * vocab in sizes, "the chunk's logits should be visible in the program"
        assert max(sizes) < batch * seq_len * vocab // 8


def test_bad_arguments_are_named() -> None:
    x, head, targets, weights = jnp.ones((4, 3, 8)), jnp.ones((8, 12)), jnp.zeros((4, 3), jnp.int32), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="must have the hidden states"):
        next_token_loss(x, head, targets[:, :2], weights, z_loss_weight=0.0, chunk_size=4)
    with pytest.raises(ValueError, match="cross_entropy_block_size=0"):
        next_token_loss(x, head, targets, weights, z_loss_weight=0.0, chunk_size=0)
    with pytest.raises(ValueError, match="batch of 4 is not a multiple of the 8 devices"):
        next_token_loss(x, head, targets, weights, z_loss_weight=0.0, chunk_size=4, mesh=make_mesh())
    with pytest.raises(ValueError, match="the head's 12 columns are not a multiple of the mesh axis tensor=8"):
        next_token_loss(x, head, targets, weights, z_loss_weight=0.0, chunk_size=4, mesh=make_mesh(tensor=8))


@pytest.mark.parametrize("mesh", [None, {"tensor": 2}, {"fsdp_ring": 2, "context": 2}])
def test_padding_of_the_vocabulary_takes_no_part(arrays: dict[str, np.ndarray], mesh: dict | None) -> None:
    padded = {**arrays, "head": np.concatenate([arrays["head"], np.full((HIDDEN, 24), 50.0)], axis=1)}
    settings = {"z_loss_weight": 0.05, "chunk_size": 7, "vocab_size": VOCAB, "mesh": None if mesh is None else make_mesh(**mesh)}
    sums, (d_hidden, d_head) = fused(padded, **settings)
    expected, expected_d_hidden, expected_d_head = reference(arrays, 0.05)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=2e-6)
    np.testing.assert_allclose(d_hidden, expected_d_hidden, atol=2e-6 * np.abs(expected_d_hidden).max())
    np.testing.assert_allclose(d_head[:, :VOCAB], expected_d_head, atol=2e-6 * np.abs(expected_d_head).max())
    assert not np.any(d_head[:, VOCAB:])
    weighty = {**padded, "targets": np.full_like(arrays["targets"], VOCAB), "weights": np.ones_like(arrays["weights"])}
    assert jnp.isnan(fused(weighty, **settings)[0].loss), "a target in the padding is outside the vocabulary"


@pytest.mark.parametrize("mesh", [{}, {"data": 8}, {"context": 2, "tensor": 2}])
def test_parts_of_the_heads_gradient_cross_devices_in_the_dtype_asked_for(arrays: dict[str, np.ndarray], mesh: dict) -> None:
    settings = {"z_loss_weight": 0.05, "chunk_size": 7, "mesh": make_mesh(**mesh)}
    _, expected_d_hidden, expected_d_head = reference(arrays, 0.05)
    for dtype, least, most in ((jnp.float32, 0.0, 2e-6), (jnp.bfloat16, 1e-3, 1e-2)):
        _, (d_hidden, d_head) = fused(arrays, **settings, gradient_dtype=dtype)
        np.testing.assert_allclose(d_hidden, expected_d_hidden, atol=2e-6 * np.abs(expected_d_hidden).max())
        assert least <= np.abs(d_head - expected_d_head).max() / np.abs(expected_d_head).max() < most


@pytest.mark.parametrize("mesh", [None, {"tensor": 2}])
def test_soft_cap_against_autodiff_of_its_definition(arrays: dict[str, np.ndarray], mesh: dict | None) -> None:
    cap, targets, weights = 3.0, jnp.asarray(arrays["targets"]), jnp.asarray(arrays["weights"], jnp.float32)

    def definition(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logits = cap * jnp.tanh(hidden @ head / cap)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return (weights * (lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] + 0.05 * lse**2)).sum()

    inputs = jnp.asarray(arrays["hidden"], jnp.float32), jnp.asarray(arrays["head"], jnp.float32)
    expected, gradients = jax.value_and_grad(definition, argnums=(0, 1))(*inputs)
    settings = {"z_loss_weight": 0.05, "chunk_size": 7, "logit_soft_cap": cap, "mesh": None if mesh is None else make_mesh(**mesh)}
    sums, actual = fused(arrays, **settings)
    np.testing.assert_allclose(sums.loss, expected, rtol=2e-6)
    for mine, theirs in zip(actual, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=3e-6 * float(jnp.abs(theirs).max()))


def test_slices_of_the_vocabulary_are_summed_before_a_gradient_is_rounded() -> None:
    """On hidden states of zero every probability is 1/64, so nothing is rounded but the sum; its parts are far larger than it is."""
    rng = np.random.default_rng(2)
    hidden, targets, vocab = jnp.zeros((4, 6, HIDDEN), jnp.bfloat16), rng.integers(0, 64, (4, 6)), 64
    head = jnp.asarray(8 + rng.normal(size=(HIDDEN, vocab)), jnp.bfloat16)
    exact = np.asarray(head, np.float64)
    expected = exact.mean(axis=1) - exact.T[targets]
    for tensor in (2, 4):

        def loss(hidden: jax.Array, tensor: int = tensor) -> jax.Array:
            settings = {"z_loss_weight": 0.0, "chunk_size": 5, "mesh": make_mesh(tensor=tensor)}
            return next_token_loss(hidden, head.astype(jnp.float32), jnp.asarray(targets), jnp.ones(targets.shape), **settings).loss

        d_hidden = jax.jit(jax.grad(loss))(hidden)
        assert d_hidden.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(d_hidden, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_the_cotangent_is_float32_beside_gradients_in_bfloat16(arrays: dict[str, np.ndarray]) -> None:
    hidden, head = jnp.asarray(arrays["hidden"], jnp.bfloat16), jnp.asarray(arrays["head"], jnp.float32)
    targets, weights, factor = jnp.asarray(arrays["targets"]), jnp.asarray(arrays["weights"]), 1 + 2**-8 + 2**-12  # bfloat16: 1 + 2**-7

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return next_token_loss(hidden, head, targets, weights, z_loss_weight=0.0, chunk_size=32).loss

    _, scaled = jax.vjp(loss, hidden, head)
    plain, times = scaled(jnp.float32(1.0)), scaled(jnp.float32(factor))  # outside jit, where every operation rounds
    np.testing.assert_array_equal(times[0], (plain[0].astype(jnp.float32) * factor).astype(jnp.bfloat16))
    np.testing.assert_allclose(times[1], plain[1] * factor, rtol=1e-6)
