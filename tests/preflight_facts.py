"""Compiled steps for tests that need no compiler: facts worked out from the estimate, as large or as slow as a test wants."""

from __future__ import annotations

from model.flops import CHIPS
from model.preflight.compiler import Compiled
from model.preflight.estimate import estimate
from model.preflight.facts import CompileFacts, CompileFailure, CompileOrder, CompileOutcome, Memory
from model.preflight.roofline import Roofline
from model.preflight.settings import Job, Setting
from model.slices import slice_named


def setting_of(order: CompileOrder) -> Setting:
    """The setting that an order's configuration spells out."""
    train = order.train
    chips = slice_named(order.slice_name).num_chips * order.num_slices
    ways = chips // (train.context_parallel_size * train.tensor_parallel_size)
    return Setting(
        remat=order.model.remat,
        microbatches=train.batch_schedule.largest // ways // train.per_device_parallelism,
        data=train.data_parallel_size,
        context=train.context_parallel_size,
        tensor=train.tensor_parallel_size,
    )


def compiled_as_estimated(order: CompileOrder, *, memory: float = 1.0, hbm: float = 1.0, exposed: float = 0.0) -> CompileFacts:
    """What a compiler that agrees with the estimate, times factors, would say; `exposed` seconds of ICI do not hide."""
    tpu_slice = slice_named(order.slice_name)
    made = estimate(Job(name="test", model=order.model, train=order.train), tpu_slice, setting_of(order))
    chip = CHIPS[tpu_slice.generation]
    hbm_seconds = made.hbm_seconds * hbm
    on_chip = max(made.compute_seconds, hbm_seconds)
    step = max(on_chip, made.ici_seconds, made.dcn_seconds) + exposed
    ideal = made.model_flops / chip.bf16_flops
    bounds = Roofline(
        model_flops_per_chip=made.model_flops,
        executed_flops_per_chip=made.executed_flops,
        hbm_bytes_per_chip=hbm_seconds * chip.hbm_bytes_per_second,
        ici_bytes_per_chip=1e9,
        dcn_bytes_per_chip=0.0,
        all_gather_async_share=0.9,
        async_share=0.8,
        compute_seconds=made.compute_seconds,
        hbm_seconds=hbm_seconds,
        on_chip_seconds=on_chip,
        ici_seconds=made.ici_seconds + exposed,
        dcn_seconds=made.dcn_seconds,
        exposed_ici_seconds=exposed,
        exposed_ici_seconds_by_colors=exposed,
        bound="compute" if made.compute_seconds >= hbm_seconds else "hbm",
        mfu_bound_hidden=ideal / max(on_chip, made.ici_seconds),
        mfu_bound_exposed=ideal / step,
        mfu_bound_exposed_by_colors=ideal / step,
        step_seconds=step,
        tokens_per_second_per_chip=1.0 / step,
    )
    return CompileFacts(
        memory=Memory(arguments=0, temporaries=int(made.hbm_bytes * memory), code=0, assigned=int(made.hbm_bytes * memory * 0.9)),
        roofline=bounds,
        mesh={"data": 1, "fsdp": 16, "fsdp_ring": 4, "context": 1, "tensor": 1},
        attention="splash",
        collectives=(),
        phases=(),
        logits_arrays=0,
        compile_cpu_seconds=1.0,
        lower_cpu_seconds=0.1,
        process_cpu_seconds=2.0,
        peak_rss_bytes=1 << 30,
    )


def out_of_memory(order: CompileOrder, *, memory: float = 1.0, temporaries_only: bool = False) -> Compiled:
    """The compiler's refusal for want of HBM, with its figure."""
    needed = compiled_as_estimated(order, memory=memory).memory.total
    failure = CompileFailure(
        kind="out_of_memory", message="Ran out of memory in memory space hbm", hbm_bytes=needed, temporaries_only=temporaries_only
    )
    return Compiled(CompileOutcome(failure=failure), from_cache=False)


def refused(message: str = "No such compile option") -> Compiled:
    """The compiler's refusal of anything else."""
    return Compiled(CompileOutcome(failure=CompileFailure(kind="refused", message=message)), from_cache=False)


def invalid(message: str) -> Compiled:
    """The refusal of the step's own code."""
    return Compiled(CompileOutcome(failure=CompileFailure(kind="invalid", message=message)), from_cache=False)


def good(facts: CompileFacts) -> Compiled:
    """A compiled step."""
    return Compiled(CompileOutcome(facts=facts), from_cache=False)
