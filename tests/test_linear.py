"""Products with split weights: values and gradients are those of einsum, and sums cross devices in the dtype asked for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model.linear import FLOAT32, Precision, linear
from model.partitioning import make_mesh, spec

CASES = [
    ("bsd,dhk->bhsk", (8, 6, 32), (32, 16), ("embed", "heads"), (32, 4, 4)),
    ("bhsk,hkd->bsd", (8, 4, 6, 4), (16, 32), ("heads_fsdp", None), (4, 4, 32)),
    ("bsd,fd->bsf", (8, 6, 32), (64, 32), ("mlp_fsdp", None), (64, 32)),
]


@pytest.mark.parametrize(("equation", "x_shape", "weight_shape", "axes", "shape"), CASES)
@pytest.mark.parametrize("sizes", [None, {"fsdp_ring": 2}, {"fsdp_ring": 2, "tensor": 2}])
def test_value_and_gradients_are_those_of_einsum(
    equation: str, x_shape: tuple, weight_shape: tuple, axes: tuple, shape: tuple, sizes: dict[str, int] | None
) -> None:
    mesh = None if sizes is None else make_mesh(**sizes)
    x, weight = jax.random.normal(jax.random.key(0), x_shape), jax.random.normal(jax.random.key(1), weight_shape)
    seed = jax.random.normal(jax.random.key(2), jax.eval_shape(lambda: jnp.einsum(equation, x, weight.reshape(shape))).shape)
    placed = weight if mesh is None else jax.device_put(weight, NamedSharding(mesh, spec(axes, mesh, weight_shape)))

    def ours(x: jax.Array, weight: jax.Array) -> jax.Array:
        return (linear(equation, x, weight, axes, shape, FLOAT32, mesh) * seed).sum()

    def reference(x: jax.Array, weight: jax.Array) -> jax.Array:
        return (jnp.einsum(equation, x, weight.reshape(shape)) * seed).sum()

    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, placed)
    expected_value, expected_gradients = jax.jit(jax.value_and_grad(reference, argnums=(0, 1)))(x, weight)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
    if mesh is not None:
        assert gradients[1].sharding.is_equivalent_to(placed.sharding, 2), "the gradient is not where its weight is"


@pytest.mark.parametrize(
    ("axes", "plane", "final"),
    [
        (("embed", "heads"), P("fsdp", "tensor"), P(("fsdp", "fsdp_ring"), "tensor")),
        (("mlp_fsdp", None), P(("tensor", "fsdp"), None), P(("tensor", "fsdp", "fsdp_ring"), None)),
    ],
)
def test_gradients_are_scattered_over_the_plane_and_then_over_the_ring(axes: tuple, plane: P, final: P) -> None:
    mesh = make_mesh(fsdp_ring=2, tensor=2)
    x, weight = jnp.ones((8, 6, 32)), jnp.ones((32, 16))
    gradient = jax.grad(lambda weight: linear("bsd,df->bsf", x, weight, axes, (32, 16), FLOAT32, mesh).sum())
    layouts = [e.params["sharding"].spec for e in jax.make_jaxpr(gradient)(weight).eqns if e.primitive.name == "sharding_constraint"]
    assert layouts[-2:] == [plane, final], "one reduce-scatter over three dimensions of the torus is none: the whole sum is sent"


@pytest.mark.parametrize("gradient", [jnp.bfloat16, jnp.float32])
def test_sums_cross_devices_in_the_dtype_asked_for(gradient: jnp.dtype) -> None:
    mesh = make_mesh()
    x, weight = jnp.ones((8, 16, 32), jnp.bfloat16), jnp.ones((32, 64), jnp.float32)

    def loss(weight: jax.Array) -> jax.Array:
        y = linear("bsd,df->bsf", x, weight, ("embed", "mlp"), (32, 64), Precision(jnp.bfloat16, gradient), mesh)
        return y.astype(jnp.float32).sum()

    placed = NamedSharding(mesh, spec(("embed", "mlp"), mesh))
    lowered = jax.jit(jax.grad(loss), in_shardings=placed, out_shardings=placed).lower(weight)
    product = next(line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line and "tensor<8x16x32xbf16>" in line)
    assert product.rstrip().split("->")[-1].strip().startswith(f"tensor<32x64x{'bf16' if gradient == jnp.bfloat16 else 'f32'}>")


@pytest.mark.parametrize("quantized", ["int8", "fp8"])
def test_quantized_products_are_close_and_their_weight_gradient_is_not_quantized(quantized: str) -> None:
    x, weight = jax.random.normal(jax.random.key(0), (4, 16, 64)), jax.random.normal(jax.random.key(1), (64, 96))
    seed = jax.random.normal(jax.random.key(2), (4, 16, 96))

    def total(precision: Precision) -> tuple:
        def loss(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = linear("bsd,df->bsf", x, weight, ("embed", "mlp"), (64, 96), precision, None)
            return (y * seed).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, weight)

    (_, exact), (exact_d_x, exact_d_weight) = total(FLOAT32)
    (_, rounded), (d_x, d_weight) = total(Precision(quantized=quantized))
    for actual, expected in ((rounded, exact), (d_x, exact_d_x)):
        error = float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))
        assert 1e-4 < error < (0.02 if quantized == "int8" else 0.06)
    np.testing.assert_array_equal(d_weight, exact_d_weight)


def test_the_gradient_of_a_wide_weight_is_made_from_the_narrow_operand() -> None:
    x, weight = jnp.ones((4, 16, 32)), jnp.ones((160, 32))
    gradient = jax.grad(lambda weight: (linear("bsd,fd->bsf", x, weight, ("mlp_fsdp", None), (160, 32), FLOAT32, None) ** 2).sum())
    program = jax.jit(gradient).lower(weight).compile().as_text()
    assert program is not None
    assert re.search(r"f32\[32,160\]\S* dot\(", program), "the wide operand is the first one again"
