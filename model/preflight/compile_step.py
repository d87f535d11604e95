"""The child process that compiles one program for a TPU slice: `python -m model.preflight.compile_step DIRECTORY`.

The directory holds `order.json`; the compiler's own reports are written beside it, and whoever made it removes it.

Speaks in JSON lines: `{"event": "stage", ...}` as it goes, `{"event": "outcome", ...}` at the end. A process of its own, because
the compiler keeps gigabytes, writes to standard error as it likes, and can take its process with it.
"""

from __future__ import annotations

import functools
import math
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.attention_backend import choose_backend
from model.batch_arithmetic import BatchArithmetic
from model.child import die_with_parent, emit
from model.flops import CHIPS, executed_flops_per_token, train_flops_per_token
from model.preflight.facts import CollectiveTotal, CompileFacts, CompileFailure, CompileOrder, CompileOutcome, Memory
from model.preflight.hlo import analyse
from model.preflight.hlo_cost import Collective, HloCost, Network
from model.preflight.optimizer_cost import optimizer_cost
from model.preflight.roofline import roofline
from model.preflight.topology import prepare, slice_devices
from model.slices import slice_named
from model.train_config import SimpleTrainConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

_OUT_OF_HBM = r"memory space hbm.*?Used ([\d.]+)([KMGT]?) of"  # where buffers were assigned: all that was asked for
_HOPELESS = r"on HBM.*?\(([\d.]+)([KMGT]?)\) exceeds"  # before they were: temporaries alone
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_step(order: CompileOrder, dump: Path) -> CompileOutcome:
    """Traces, lowers and compiles the program, and reads what it costs: of a train step everything, of an evaluation its memory.

    dump: a directory for what the compiler reports.

    Raises:
        ValueError: libtpu is missing, or does not know the slice.
    """
    prepare()
    emit("stage", name="load")
    program = _program(order, dump)
    if isinstance(program, CompileFailure):
        return CompileOutcome(failure=program)
    if order.program == "evaluation":
        memory = _memory(program, assigned_bytes(dump))
        beside = _state_bytes_beside_weights(order, program.mesh)
        return CompileOutcome(evaluation=memory.model_copy(update={"arguments": memory.arguments + beside}))
    alone = program
    if order.num_slices > 1 and any(slice_named(order.slice_name).wrap):
        alone = _program(_one_slice(order), dump / "alone")
        if isinstance(alone, CompileFailure):
            return CompileOutcome(failure=alone)
    emit("stage", name="analyse")
    return CompileOutcome(facts=_facts(order, program, alone, assigned_bytes(dump)))


@dataclass(frozen=True, eq=False)
class _Program:
    """A compiled step."""

    mesh: Mesh
    compiled: Any
    lower_cpu_seconds: float
    compile_cpu_seconds: float


def _program(order: CompileOrder, dump: Path) -> _Program | CompileFailure:
    from model.mesh import make_mesh

    devices, train = slice_devices(slice_named(order.slice_name), order.num_slices), order.train
    emit("stage", name="trace")
    started = time.process_time()
    try:
        mesh = make_mesh(**train.mesh_sizes, devices=devices)
        lowered = _lower(order, mesh)
    except ValueError as error:
        return CompileFailure(kind="invalid", message=str(error))
    lowered_at = time.process_time()
    emit("stage", name="compile")
    try:
        compiled = lowered.compile(compiler_options=order.compiler_options | _dump_options(dump))
    except Exception as error:  # jaxlib's XlaRuntimeError and plain ValueErrors about options: the text is what tells them apart
        return failure_of(str(error))
    return _Program(mesh, compiled, lowered_at - started, time.process_time() - lowered_at)


def _one_slice(order: CompileOrder) -> CompileOrder:
    """The same step on one slice with its share of the batch: what a chip does there is the same but for the other slices."""
    train, count = order.train, order.num_slices
    shares = {"train_batch_size": train.batch_schedule.largest // count, "data_parallel_size": train.data_parallel_size // count}
    alone = SimpleTrainConfig(**{**dict(train), **shares, "slice_count": 1})
    return order.model_copy(update={"train": alone, "num_slices": 1})


def _lower(order: CompileOrder, mesh: Mesh) -> Any:
    from model.train_step import abstract_batch, abstract_state, make_eval_step, make_train_step

    batch, state = BatchArithmetic.of(order.train, mesh.devices.size), abstract_state(order.model, order.train, mesh)
    if order.program == "evaluation":
        held_out = abstract_batch((batch.eval_rows(order.train), _seq_len(order)), mesh)
        return make_eval_step(order.model, order.train, mesh).lower(state.eval_params, held_out)
    whole = abstract_batch((order.train.batch_schedule.largest, _seq_len(order)), mesh)
    return make_train_step(order.model, order.train, mesh, batch.num_microbatches).lower(state, whole)


def _state_bytes_beside_weights(order: CompileOrder, mesh: Mesh) -> int:
    """What a chip holds of the train state without the weights that are evaluated."""
    import jax

    from model.train_step import abstract_state

    def chip_bytes(tree: Any) -> int:
        return sum(math.prod(part.sharding.shard_shape(part.shape)) * part.dtype.itemsize for part in jax.tree.leaves(tree))

    state = abstract_state(order.model, order.train, mesh)
    return chip_bytes(state) - chip_bytes(state.eval_params)


def _memory(program: _Program, assigned: int | None) -> Memory:
    declared = program.compiled.memory_analysis()
    return Memory(
        arguments=declared.argument_size_in_bytes,
        temporaries=declared.temp_size_in_bytes,
        code=declared.generated_code_size_in_bytes,
        assigned=assigned,
    )


def _facts(order: CompileOrder, program: _Program, alone: _Program, assigned: int | None) -> CompileFacts:
    """What was compiled. alone: of several slices that are tori, one by itself.

    Ahead of time libtpu heeds `wrap` for one slice only: for several it makes padded all-reduces of all-gathers, as if there were no
    rings. So memory and what crosses between slices is read from the program for all, the rest from that for one.
    """
    tpu_slice, model, seq_len, mesh = slice_named(order.slice_name), order.model, _seq_len(order), program.mesh
    attention = choose_backend(model, seq_len, "tpu")
    chips_per_slice = tpu_slice.num_chips if order.num_slices > 1 else None
    optimizer = optimizer_cost(model, order.train, mesh.devices.size // mesh.shape["data"])
    read = functools.partial(analyse, causal_loops=attention == "flash", branches=optimizer.further_gradients or 1.0)
    whole = cost = read(program.compiled.as_text(), chips_per_slice=chips_per_slice)
    if alone is not program:
        cost = read(alone.compiled.as_text()).with_dcn_of(whole)
    tokens_per_chip = order.train.batch_schedule.largest * seq_len / mesh.devices.size
    executed = executed_flops_per_token(model, seq_len, remat=model.remat, attention=attention, context=order.train.context_parallel_size)
    bounds = roofline(
        CHIPS[tpu_slice.generation],
        tpu_slice,
        cost,
        tokens_per_chip=tokens_per_chip,
        coordinates=[device.coords for device in alone.mesh.devices.flat],
        model_flops_per_chip=train_flops_per_token(model, seq_len) * tokens_per_chip,
        executed_flops_per_chip=executed * tokens_per_chip * (1 + optimizer.further_gradients) + optimizer.flops,
    )
    programs = {program, alone}
    return CompileFacts(
        memory=_memory(program, assigned),
        roofline=bounds,
        mesh=dict(mesh.shape),
        attention=attention,
        collectives=_totals(cost),
        phases=cost.phases,
        logits_arrays=_logits_arrays(order, mesh, whole),
        compile_cpu_seconds=sum(one.compile_cpu_seconds for one in programs),
        lower_cpu_seconds=sum(one.lower_cpu_seconds for one in programs),
        process_cpu_seconds=time.process_time(),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _logits_arrays(order: CompileOrder, mesh: Mesh, cost: HloCost) -> int:
    """Arrays that hold the logits of a whole microbatch; the loss is there to make none."""
    batch, width = BatchArithmetic.of(order.train, mesh.devices.size), order.model.hidden_dim
    tokens, vocabulary = _seq_len(order) // batch.context, order.model.padded_vocab_size // batch.tensor
    ways = (1, mesh.shape["fsdp"], batch.fsdp, batch.fsdp * batch.context)
    return len(cost.whole_logits((batch.per_device, tokens, vocabulary), {width // one for one in ways}))


def _totals(cost: HloCost) -> tuple[CollectiveTotal, ...]:
    kinds: dict[tuple[Network, str, bool], list[Collective]] = {}
    for one in cost.collectives:
        kinds.setdefault((one.network, one.kind, one.is_async), []).append(one)
    return tuple(
        CollectiveTotal(
            kind=kind,
            is_async=is_async,
            network=network,
            times=sum(one.times for one in several),
            wire_bytes=sum(one.total_wire_bytes for one in several),
        )
        for (network, kind, is_async), several in sorted(kinds.items(), key=lambda item: item[0])
    )


def failure_of(message: str) -> CompileFailure:
    """What the compiler's error means. Running out of vector memory is a matter of its options, of HBM one of the job."""
    in_full, hopeless = (re.search(pattern, message, re.DOTALL) for pattern in (_OUT_OF_HBM, _HOPELESS))
    found = in_full or hopeless
    if found is None:
        return CompileFailure(kind="refused", message=_first_lines(message))
    used = int(float(found.group(1)) * _UNITS[found.group(2)])
    return CompileFailure(kind="out_of_memory", message=_first_lines(message), hbm_bytes=used, temporaries_only=in_full is None)


def _first_lines(message: str, count: int = 3) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:count])[:500]


def _dump_options(directory: Path) -> dict[str, Any]:
    return {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}


def assigned_bytes(dump: Path) -> int | None:
    """HBM that the buffer assignment lays out, from the compiler's own report; None where there is none."""
    for report in sorted(dump.glob("*memory-usage-report.txt")):
        found = re.search(r"Total bytes[^\d]*(\d+)", report.read_text(encoding="utf-8", errors="replace"))
        if found:
            return int(found.group(1))
    return None


def _seq_len(order: CompileOrder) -> int:
    return order.train.seq_len_for(order.model)


def main(arguments: list[str]) -> int:
    """Runs one order; exit status 0 also where the compiler said no."""
    die_with_parent()
    directory = Path(arguments[0])
    order = CompileOrder.model_validate_json((directory / "order.json").read_text(encoding="utf-8"))
    try:
        outcome = compile_step(order, directory / "dump")
    except ValueError as error:
        emit("error", message=str(error))
        return 1
    emit("outcome", **outcome.model_dump(mode="json"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
