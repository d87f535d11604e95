"""Compiler options worth trying, by generation: what each set is for, best first.

libtpu refuses or cannot honour a set for some shapes (asynchronous all-reduces, for one, overflow the vector memory of v4), so a
set is a proposal: `model.preflight.search` compiles with it, falls back to the next where it is refused, and keeps the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.slices import Generation


@dataclass(frozen=True)
class FlagSet:
    """Options of one compilation (`compiler_options=` of JAX), with what they are for."""

    name: str
    options: dict[str, str]
    purpose: str


NONE = FlagSet("none", {}, "the compiler's own defaults")

# Without them no all-gather of v4 and v5p overlaps anything.
ASYNC_ALL_GATHER = FlagSet(
    "async-all-gather",
    {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
    "weights are gathered while the layer before computes",
)

# Partial sums of a weight gradient go round the ring while the next block of rows is multiplied. Each block reads the whole other
# operand again, from HBM where it does not stay on the chip: whether that pays is what the roofline, loop by loop, decides.
REDUCE_SCATTER_MATMUL = FlagSet(
    "reduce-scatter-matmul",
    {**ASYNC_ALL_GATHER.options, "xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd"},
    "and weight gradients are scattered while they are computed",
)

# On v5e and v6e the compiler makes such blocks of its own accord, for rings of up to 256 chips: a step of 2 billion parameters on 32
# chips of v6e then moves 972 GB through HBM, and 475 without.
WHOLE_PRODUCTS = FlagSet(
    "whole-products",
    {**ASYNC_ALL_GATHER.options, "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    "weights are gathered ahead, and no product is cut into blocks",
)

FLAG_SETS = (NONE, ASYNC_ALL_GATHER, REDUCE_SCATTER_MATMUL, WHOLE_PRODUCTS)

_VECTOR_MEMORY = 128 * 2**20  # of v5e and v6e: an operand that it holds can be read again for every block


@dataclass(frozen=True)
class FlagChoice:
    """The sets for one step: those worth comparing, best first, and those for where the compiler refuses all of these."""

    compared: tuple[FlagSet, ...]
    fallbacks: tuple[FlagSet, ...]


def flag_choice(generation: Generation, operand_bytes: float) -> FlagChoice:
    """What to compile with.

    operand_bytes: of the largest activation that a weight gradient is made from, on one chip.
    """
    if generation in ("v4", "v5p"):
        return FlagChoice((REDUCE_SCATTER_MATMUL, ASYNC_ALL_GATHER), (NONE,))
    if operand_bytes <= _VECTOR_MEMORY:
        return FlagChoice((WHOLE_PRODUCTS, REDUCE_SCATTER_MATMUL), (ASYNC_ALL_GATHER, NONE))
    return FlagChoice((WHOLE_PRODUCTS,), (ASYNC_ALL_GATHER, NONE))
