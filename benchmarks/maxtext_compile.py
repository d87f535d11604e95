"""The train step of job R1 as the TPU compiler sees it, ours beside MaxText's: HBM, bytes over ICI, FLOPs of one chip.

    python benchmarks/maxtext_compile.py [--slice v4-128] [--layers 24] [--json FILE]

Same widths, batch, slice and remat (`full`); no chip is needed. MaxText comes through its own `train_compile`, in its own
environment and so with its own libtpu, which is newer than ours; one walker (`model.preflight.hlo`) reads both programs.
Takes minutes and 5 GB of memory for MaxText. Ours is compiled with its compiler options and without any, MaxText's with its defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
SCALES = {"GiB": 2**30, "GB": 1e9, "TF": 1e12}


def measure_maxtext(spec: dict[str, Any]) -> dict[str, Any]:
    """The child, run by MaxText's interpreter: compiles with MaxText's own entry point, leaves the program's text in `spec["hlo"]`."""
    os.environ.pop("TPU_LIBRARY_PATH", None)  # a parent that imported JAX names its own libtpu there
    import maxtext  # pyright: ignore[reportMissingImports]
    from maxtext.trainers.pre_train import train_compile  # pyright: ignore[reportMissingImports]

    found: dict[str, Any] = {}
    compile_step = train_compile.jit_and_compile

    def observed(*arguments: Any) -> Any:
        started = time.process_time()
        compiled = compile_step(*arguments)
        found["compile_cpu_s"] = time.process_time() - started
        memory = compiled.memory_analysis()
        found["arguments"], found["temporaries"] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        found["code"] = memory.generated_code_size_in_bytes
        Path(spec["hlo"]).write_text(compiled.as_text(), encoding="utf-8")
        return compiled

    train_compile.jit_and_compile = observed
    train_compile.main(["train_compile", str(Path(str(maxtext.__file__)).parent / "configs" / "base.yml"), *spec["options"]])
    return found | {"versions": {name: version(name) for name in ("maxtext", "jax", "libtpu")}}


def maxtext_options(job: Any, tpu_slice: Any, output: str) -> list[str]:
    """MaxText's names for our job: the same model, batch, FSDP over all chips, splash attention in the same blocks."""
    model, train = job.model, job.train
    options = {
        "run_name": "compare",
        "base_output_directory": output,
        "compile_topology": tpu_slice.name,
        "compile_topology_num_slices": 1,
        "ici_fsdp_parallelism": tpu_slice.num_chips,
        "base_emb_dim": model.hidden_dim,
        "base_mlp_dim": model.intermediate_dim,
        "base_num_query_heads": model.num_heads,
        "base_num_kv_heads": model.num_kv_heads,
        "base_num_decoder_layers": model.num_layers,
        "head_dim": model.head_size,
        "vocab_size": model.vocab_size,
        "max_target_length": model.seq_len,
        "per_device_batch_size": train.batch_schedule.largest // tpu_slice.num_chips,
        "decoder_block": "llama2",
        "mlp_activations": '["silu","linear"]',
        "attention": "flash",
        "dtype": "bfloat16",
        "weight_dtype": "float32",
        "z_loss_multiplier": train.z_loss_weight,
        "remat_policy": "full",
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
    }
    return [f"{name}={value}" for name, value in options.items()]


def maxtext_figures(job: Any, tpu_slice: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Compiles MaxText's step and reads its program; figures and the versions that made them.

    Raises:
        Missing: its environment cannot be made.
        RuntimeError: MaxText failed.
        model.preflight.hlo.HloError: its newer compiler writes what our walker does not understand.
    """
    from environments import MAXTEXT, environment, run_child

    from model.preflight.hlo import analyse
    from model.preflight.topology import ENVIRONMENT

    python = environment(*MAXTEXT)
    with tempfile.TemporaryDirectory() as directory:
        hlo = Path(directory) / "step.hlo"
        spec = {"options": maxtext_options(job, tpu_slice, directory), "hlo": str(hlo)}
        found = run_child(python, __file__, spec, **{**ENVIRONMENT, "DECOUPLE_GCLOUD": "TRUE", "PYTHONPATH": str(Path(__file__).parent)})
        cost = analyse(hlo.read_text(encoding="utf-8"))
    memory = {name: found[name] for name in ("arguments", "temporaries", "code")}
    parts = {kind: cost.wire_bytes(kind) for kind in sorted({one.kind for one in cost.collectives})}
    kernels = cost.custom_calls.get("tpu_custom_call", 0)
    shape = job.train.batch_schedule.largest // tpu_slice.num_chips, job.model.seq_len, job.model.vocab_size
    logits = len(cost.whole_logits(shape, {job.model.hidden_dim, job.model.hidden_dim // tpu_slice.num_chips}))
    return figures_of(job, tpu_slice, memory, parts, cost.dot_flops, kernels, logits, found["compile_cpu_s"]), found["versions"]


def our_figures(job: Any, tpu_slice: Any, options: dict[str, str]) -> dict[str, float]:
    """The same of our step, through preflight's compiler. Raises RuntimeError where it does not compile."""
    from model.preflight.compiler import compile_order
    from model.preflight.facts import CompileOrder

    model = job.model.model_copy(update={"gradient_checkpointing": "full"})
    train = job.train.model_copy(update={"accelerator_type": tpu_slice.name})
    order = CompileOrder(model=model, train=train, slice_name=tpu_slice.name, num_slices=1, compiler_options=options)
    outcome = compile_order(order).outcome
    if outcome.facts is None:
        raise RuntimeError(f"our step does not compile: {outcome.failure}")
    facts = outcome.facts
    memory = {"arguments": facts.memory.arguments, "temporaries": facts.memory.temporaries, "code": facts.memory.code}
    parts: dict[str, float] = {}
    for one in facts.collectives:
        parts[one.kind] = parts.get(one.kind, 0) + one.wire_bytes
    flops, kernels = (sum(getattr(phase, name) for phase in facts.phases) for name in ("dot_flops", "kernels"))
    return figures_of(job, tpu_slice, memory, parts, flops, kernels, facts.logits_arrays, facts.compile_cpu_seconds)


def figures_of(
    job: Any,
    tpu_slice: Any,
    memory: Mapping[str, float],
    sent: Mapping[str, float],
    flops: float,
    kernels: int,
    logits: int,
    compile_cpu_s: float,
) -> dict[str, float]:
    """What is compared, by name and unit, per chip and step."""
    from model.flops import executed_flops_per_token, train_flops_per_token

    model, tokens = job.model, job.batch_size * job.model.seq_len / tpu_slice.num_chips
    # What differs between recomputing attention and not is one forward kernel: two matmuls over the kernel's square.
    forward = tokens * (
        executed_flops_per_token(model, model.seq_len, remat="full", attention="splash")
        - executed_flops_per_token(model, model.seq_len, remat="save_attn", attention="splash")
    )
    # Forward once for each kernel above the two of the backward pass, which are 3.5 forwards together.
    attention = forward * (kernels / model.num_layers - 2 + 3.5)
    return {
        **{f"HBM {name}, GiB": value for name, value in memory.items()},
        "HBM, GiB": sum(memory.values()),
        **{f"ICI {kind}, GB": value for kind, value in sent.items()},
        "ICI, GB": sum(sent.values()),
        "products in HLO, TF": flops,
        "attention kernels run": kernels,
        "executed, TF": flops + attention,
        "model FLOPs, TF": tokens * train_flops_per_token(model, model.seq_len),
        "arrays [*, sequence, vocabulary]": logits,
        "compile, CPU-seconds": compile_cpu_s,
    }


def table(columns: dict[str, dict[str, float]]) -> str:
    """One line a figure, one column a program."""
    lines = [f"{'per chip and step':36}" + "".join(f"{name:>20}" for name in columns)]
    for figure in dict.fromkeys(name for column in columns.values() for name in column):
        scale = SCALES.get(figure.rpartition(", ")[2], 1)
        lines.append(f"{figure:36}" + "".join(f"{column.get(figure, 0) / scale:>20.4g}" for column in columns.values()))
    return "\n".join(lines)


def main() -> int:
    """The command line; exit status 1 where one of HBM, ICI bytes and executed FLOPs is worse than MaxText's."""
    parser = argparse.ArgumentParser(description="Our compiled train step beside MaxText's, for a TPU slice, without a chip.")
    parser.add_argument("--slice", default="v4-128", help="accelerator type (default v4-128)")
    parser.add_argument("--layers", type=int, help="fewer layers than R1's 24")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_maxtext(json.loads(arguments.child))))
        return 0
    sys.path.insert(0, str(CHECKOUT))
    from model.preflight.compiler_flags import NONE, flag_choice
    from model.presets import job_named
    from model.slices import slice_named

    job, tpu_slice = job_named("R1"), slice_named(arguments.slice)
    if arguments.layers:
        job = job.model_copy(update={"model": job.model.model_copy(update={"num_layers": arguments.layers})})
    theirs, versions = maxtext_figures(job, tpu_slice)
    columns = {
        "ours": our_figures(job, tpu_slice, flag_choice(tpu_slice.generation, 0).compared[0].options),
        "ours, no options": our_figures(job, tpu_slice, NONE.options),
        "MaxText": theirs,
    }
    print(table(columns))
    print("MaxText: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    print("ours: " + ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu")))
    worse = [name for name in ("HBM, GiB", "ICI, GB", "executed, TF") if columns["ours"][name] > theirs[name]]
    print(f"MISSED: {', '.join(worse)}: more than MaxText's" if worse else "met: HBM, ICI bytes and executed FLOPs no worse than MaxText's")
    if arguments.json:
        report = {"columns": columns, "versions": versions, "load_average": os.getloadavg()}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
