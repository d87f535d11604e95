"""Rotary embedding: frequencies of each scaling rule, and rotation by distance."""

import jax
import jax.numpy as jnp
import numpy as np

from model.config import LlamaConfig, RopeConfig
from model.rope import apply_rope, rope_frequencies, rope_tables


def config(rope: RopeConfig, head_dim: int = 64) -> LlamaConfig:
    return LlamaConfig(hidden_dim=64, num_heads=1, num_kv_heads=1, head_dim=head_dim, rope=rope)


def test_default_frequencies_are_a_geometric_series() -> None:
    frequencies = rope_frequencies(config(RopeConfig(theta=500_000.0)))
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, [500_000.0 ** (-2 * i / 64) for i in range(32)], rtol=1e-14)


def test_linear_scaling_divides_every_frequency() -> None:
    np.testing.assert_allclose(
        rope_frequencies(config(RopeConfig(type="linear", factor=4.0))) * 4.0, rope_frequencies(config(RopeConfig())), rtol=1e-14
    )


def test_llama3_scaling_keeps_short_waves_divides_long_ones_and_blends_between() -> None:
    rope = RopeConfig(type="llama3", theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, scaled = rope_frequencies(config(RopeConfig(theta=500_000.0))), rope_frequencies(config(rope))
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    between = ~short & ~long
    assert short.any()
    assert long.any()
    assert between.any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-14)
    np.testing.assert_allclose(scaled[long], plain[long] / 8.0, rtol=1e-14)
    blend = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    np.testing.assert_allclose(scaled[between], ((1 - blend) * plain / 8.0 + blend * plain)[between], rtol=1e-13)


def test_scores_depend_on_the_distance_only() -> None:
    shape = config(RopeConfig(), head_dim=16)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(query_position: int, key_position: int) -> jax.Array:
        rotated = [apply_rope(x, rope_tables(jnp.array([[position]]), shape)) for x, position in ((q, query_position), (k, key_position))]
        return (rotated[0] * rotated[1]).sum()

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotation_keeps_the_norm_and_the_dtype() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 16)).astype(jnp.bfloat16)
    rotated = apply_rope(x, rope_tables(jnp.arange(5)[None], config(RopeConfig(), head_dim=16)))
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated.astype(jnp.float32), axis=-1), jnp.linalg.norm(x.astype(jnp.float32), axis=-1), rtol=1e-2
    )


def test_tables_broadcast_over_heads() -> None:
    cos, sin = rope_tables(jnp.zeros((2, 5), jnp.int32), config(RopeConfig(), head_dim=16))
    assert cos.shape == sin.shape == (2, 1, 5, 16)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_array_equal(cos, 1.0)
    np.testing.assert_array_equal(sin, 0.0)
