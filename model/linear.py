"""Products with weights that are split over the fsdp axes: gathered for use, their gradients scattered.

The weight is cast before it is gathered, so that half the bytes move. Its gradient is summed over the chips in two steps,
first over the plane of the torus and then over the ring, each of them a reduce-scatter; asked for both at once the
compiler sums everything everywhere and throws most of it away (see `model.mesh`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from model.config import QuantizedDtype
from model.mesh import platform_of
from model.partitioning import gathered, spec

_QUANTIZED_DTYPES: dict[QuantizedDtype, DTypeLike] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@dataclass(frozen=True)
class Precision:
    """In what numbers a product is made.

    Attributes:
        compute: dtype of both operands; sums inside one chip are float32 on every platform.
        gradient: dtype in which the parts of a weight's gradient cross from chip to chip. bfloat16 halves the traffic and
            rounds each part once per hop; float32 does not.
        quantized: the type that both operands are rounded to for the product and for the gradient in the activations; the
            gradient in the weights, which the optimizer sums up for the whole run, is never quantized. None: not at all.
    """

    compute: DTypeLike = jnp.float32
    gradient: DTypeLike = jnp.float32
    quantized: QuantizedDtype | None = None


FLOAT32 = Precision()


def linear(
    equation: str,
    x: jax.Array,
    weight: jax.Array,
    axes: Sequence[str | None],
    shape: tuple[int, ...],
    precision: Precision,
    mesh: Mesh | None,
) -> jax.Array:
    """`einsum(equation, x, weight)` in the compute dtype, differentiable in both.

    Args:
        equation: two operands, for example "bsd,dhk->bhsk".
        x: activations in the compute dtype.
        weight: float32 [in, out].
        axes: logical axes of `weight`'s two dimensions.
        shape: what [in, out] is read as in the equation, for example [D, H, K].
        precision: see `Precision`.
        mesh: None for one device.
    """
    return _linear(_Product(equation, tuple(axes), shape, precision, mesh), x, weight)


@dataclass(frozen=True)
class _Product:
    equation: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    precision: Precision
    mesh: Mesh | None

    def whole(self, weight: jax.Array) -> jax.Array:
        """The weight whole over the fsdp axes, in the compute dtype."""
        weight = weight.astype(self.precision.compute)
        if self.mesh is not None:
            whole = gathered(spec(self.axes, self.mesh, weight.shape))
            weight = jax.lax.with_sharding_constraint(weight, NamedSharding(self.mesh, whole))
        return weight.reshape(self.shape)

    def backward_equations(self) -> tuple[str, str]:
        """Those of the gradients in x and in the weight."""
        operands, result = self.equation.split("->")
        left, right = operands.split(",")
        return f"{result},{right}->{left}", f"{left},{result}->{right}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(product: _Product, x: jax.Array, weight: jax.Array) -> jax.Array:
    return _product(product.equation, x, product.whole(weight), product.precision)


def _forward(product: _Product, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(product, x, weight), (x, weight)


def _backward(product: _Product, saved: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    x_equation, weight_equation = product.backward_equations()
    d_x = _product(x_equation, d_y, product.whole(weight), product.precision)
    d_weight = _weight_gradient(weight_equation, x, d_y, product.precision.gradient, platform_of(product.mesh))
    return d_x, scattered(d_weight.reshape(weight.shape), product.axes, product.mesh).astype(weight.dtype)


_linear.defvjp(_forward, _backward)


def _weight_gradient(equation: str, x: jax.Array, d_y: jax.Array, dtype: DTypeLike, platform: str) -> jax.Array:
    """`einsum(equation, x, d_y)`. The CPU is given the narrower operand first: it transposes the first one of a product over tokens,
    which costs as much as the product itself where that is the wide one. The result, which is small, is transposed instead.
    """
    if platform != "cpu":
        return jnp.einsum(equation, x, d_y, preferred_element_type=dtype)
    operands, result = equation.split("->")
    pairs = sorted(zip(operands.split(","), (x, d_y), strict=True), key=lambda pair: pair[1].size)
    order = "".join(axis for names, _ in pairs for axis in result if axis in names)
    names = ",".join(names for names, _ in pairs)
    d_weight = jnp.einsum(f"{names}->{order}", *(array for _, array in pairs), preferred_element_type=dtype)
    if order == result:
        return d_weight
    # Without a barrier the compiler would swap the operands back to be spared the transposition.
    return jax.lax.optimization_barrier(d_weight).transpose([order.index(axis) for axis in result])


def _product(equation: str, left: jax.Array, right: jax.Array, precision: Precision) -> jax.Array:
    """The einsum of two operands, each rounded with one scale for every row that is summed over where that is asked for."""
    if precision.quantized is None:
        return jnp.einsum(equation, left, right)
    import qwix  # an optional dependency

    operands, result = equation.split("->")
    quantized = [
        qwix.quantize(
            operand, _QUANTIZED_DTYPES[precision.quantized], channelwise_axes=[axis for axis, name in enumerate(names) if name in result]
        )
        for operand, names in zip((left, right), operands.split(","), strict=True)
    ]
    return qwix.einsum(equation, *quantized).astype(precision.compute)


def scattered(d_weight: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """The gradient laid out like its weight: first over the plane of the torus, then over the ring."""
    if mesh is None:
        return d_weight
    final = spec(axes, mesh, d_weight.shape)
    on_plane = gathered(final, keep=("fsdp",))
    for partition in dict.fromkeys((on_plane, final)):
        d_weight = jax.lax.with_sharding_constraint(d_weight, NamedSharding(mesh, partition))
    return d_weight
