"""The gradient of causal attention on the CPU at 8,192 tokens: memory and CPU-seconds of our two forms beside `jax.nn`'s.

    python benchmarks/attention.py [--rounds N] [--quick] [--json FILE]

Float32, one sequence, 8 heads of width 64. Memory is what the compiler sets aside for temporaries (`memory_analysis()`), not what
a process is seen to use. Each form runs in a fresh process; --quick compiles all three and runs none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
BATCH, HEADS, SEQ_LEN, HEAD_SIZE = 1, 8, 8192, 64
FORMS = ("flash", "plain", "jax.nn")
TEMPORARIES_MIB = 800


def form(name: str) -> Callable[[Any, Any, Any], Any]:
    """A function of q, k, v [B, H, S, K] to the output of the same shape. Raises KeyError for a name not in `FORMS`."""
    import jax

    from model.attention import plain_attention
    from model.flash_attention import flash_attention

    def jax_nn(q_BHSK: Any, k_BHSK: Any, v_BHSK: Any) -> Any:
        q, k, v = (x.swapaxes(1, 2) for x in (q_BHSK, k_BHSK, v_BHSK))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla").swapaxes(1, 2)

    return {"flash": flash_attention, "plain": plain_attention, "jax.nn": jax_nn}[name]


def compiled_gradient(name: str, seq_len: int = SEQ_LEN) -> Any:
    """The compiled gradient of the sum of squares of the output in q, k and v, float32."""
    import jax
    import jax.numpy as jnp

    attend = form(name)
    array = jax.ShapeDtypeStruct((BATCH, HEADS, seq_len, HEAD_SIZE), jnp.float32)
    gradient = jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(array, array, array).compile()


def temporaries_mib(compiled: Any) -> float:
    """MiB that a compiled program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def measure_side(spec: dict[str, Any]) -> dict[str, float]:
    """One child process: compiles a form, and where `spec["run"]` runs it once to warm up and once on the clock."""
    import jax

    compiled = compiled_gradient(spec["side"])
    found = {"temporaries_mib": temporaries_mib(compiled)}
    if not spec["run"]:
        return found
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (BATCH, HEADS, SEQ_LEN, HEAD_SIZE)) for key in keys]
    jax.block_until_ready(compiled(*arrays))
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    return found | {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def main() -> int:
    """The command line; exit status 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description="Memory and time of the gradient of attention on the CPU.")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each form (default 3)")
    parser.add_argument("--quick", action="store_true", help="compile only")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.path.insert(0, str(CHECKOUT))
        print(json.dumps(measure_side(json.loads(arguments.child))))
        return 0
    from measure import bar, child

    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMS}
    for number in range(1 if arguments.quick else arguments.rounds):
        for name in FORMS if number % 2 == 0 else reversed(FORMS):
            measured[name].append(child(__file__, side=name, run=not arguments.quick))
    medians = {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in measured.items()}
    print(f"{'gradient, 8,192 tokens':28}{'temporaries, MiB':>18}{'CPU-seconds':>14}{'seconds':>10}")
    for name, row in medians.items():
        times = "".join(f"{row[key]:>{width}.4g}" for key, width in (("cpu_s", 14), ("wall_s", 10)) if key in row)
        print(f"{name:28}{row['temporaries_mib']:>18.0f}{times}")
    held = bar("temporaries of flash, MiB", medians["flash"]["temporaries_mib"], at_most=TEMPORARIES_MIB)
    print(f"{'met' if held['met'] else 'MISSED'}: {held['what']}: {held['value']:.0f} (at most {TEMPORARIES_MIB})")
    if arguments.json:
        report = {"rows": measured, "medians": medians, "bar": held, "load_average": os.getloadavg()}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return not held["met"]


if __name__ == "__main__":
    sys.exit(main())
