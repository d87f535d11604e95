"""Programs of the TPU compiler for tests: `python -m tests.tpu_programs DIRECTORY` compiles the orders that lie there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from model.preflight.facts import CompileOrder

CHECKOUT = Path(__file__).resolve().parent.parent
_LOUD = {"TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0", "TF_CPP_MIN_LOG_LEVEL": "0"}  # else warnings are lost


@dataclass(frozen=True)
class Program:
    """A compiled step: its optimised HLO, and of one chip the FLOPs by XLA's own cost analysis and bytes of HBM."""

    text: str
    flops: float
    argument_bytes: int
    hbm_bytes: int  # arguments among them


def compiled_programs(orders: Mapping[str, CompileOrder], directory: Path) -> tuple[dict[str, Program], str]:
    """The programs by the names of their orders, and what the compiler said. All in one process, without a cache."""
    for name, order in orders.items():
        (directory / f"{name}.order").write_text(order.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "tests.tpu_programs", str(directory)]
    variables = os.environ | {"PYTHONPATH": str(CHECKOUT), "XLA_FLAGS": ""}  # those of the tests are for CPUs
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables, cwd=CHECKOUT, timeout=500)
    assert child.returncode == 0, child.stderr[-2000:]
    return {name: Program(**json.loads((directory / f"{name}.program").read_text(encoding="utf-8"))) for name in orders}, child.stderr


def main(directory: Path) -> None:
    """Compiles every order of the directory and writes its program beside it."""
    from model.preflight.compile_step import CompileFailure, _program
    from model.preflight.topology import prepare

    prepare()
    os.environ.update(_LOUD)
    for path in sorted(directory.glob("*.order")):
        order = CompileOrder.model_validate_json(path.read_text(encoding="utf-8"))
        made = _program(order, directory / "dump")
        assert not isinstance(made, CompileFailure), made.message
        memory = made.compiled.memory_analysis()
        program = Program(
            text=made.compiled.as_text(),
            flops=made.compiled.cost_analysis()["flops"],
            argument_bytes=memory.argument_size_in_bytes,
            hbm_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        )
        path.with_suffix(".program").write_text(json.dumps(asdict(program)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
