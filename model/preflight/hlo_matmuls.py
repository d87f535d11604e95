"""FLOPs of the matrix products in compiled HLO: `dot`, and the `convolution` that XLA for TPU writes most of them as."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np

from model.preflight.hlo_text import Computation, Instruction


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of one execution of a dot or convolution, a multiplication and an addition counted apart.

    Raises:
        HloError: its dimensions are not written in the form this reader knows.
    """
    return _dot(computation, instruction) if instruction.opcode == "dot" else _convolution(computation, instruction)


def is_int8(computation: Computation, instruction: Instruction) -> bool:
    """Whether both operands are integers of 8 bits or fewer, which chips other than v4 multiply twice as fast as bfloat16."""
    return all(computation.operand(instruction, side).arrays[0].dtype in ("s8", "u8", "s4", "u4") for side in (0, 1))


def _dot(computation: Computation, instruction: Instruction) -> float:
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    if contracted is None:
        raise instruction.error("a dot without lhs_contracting_dims")
    left = computation.operand(instruction, 0).arrays[0].dims
    return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[int(dim)] for dim in contracted.split(",") if dim)


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Batch and kernel dimensions disguised as padded windows count where they meet data only, as in XLA's own cost analysis."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise instruction.error("a convolution without dim_labels")
    arrays = computation.operand(instruction, 0).arrays[0], computation.operand(instruction, 1).arrays[0], instruction.arrays[0]
    left, kernel, out = (dict(zip(names, array.dims, strict=True)) for names, array in zip(labels.groups(), arrays, strict=True))
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(field.split("=") for field in window.split())
    flops = 2.0 * out["b"] * out["f"] * kernel["i"]
    for spatial in sorted(name for name in out if name.isdigit()):
        position = int(spatial)

        def field(name: str, default: str, position: int = position) -> str:
            return fields[name].split("x")[position] if name in fields else default

        flops *= _meetings(
            left[spatial],
            int(field("size", str(kernel[spatial]))),
            out[spatial],
            int(field("stride", "1")),
            int(field("pad", "0_0").split("_")[0]),
            int(field("lhs_dilate", "1")),
            int(field("rhs_dilate", "1")),
        )
    return flops


@cache
def _meetings(size: int, window: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output position and a window position that fall on an element, not on padding or between elements."""
    places = np.arange(out) * stride - pad
    count = 0
    for offset in range(0, window * rhs_dilate, rhs_dilate):
        element, between = np.divmod(places + offset, lhs_dilate)
        count += int(np.count_nonzero((between == 0) & (element >= 0) & (element < size)))
    return count
