"""How far a preflight is, on standard error: a live line in a terminal, a line for each compilation elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

from model.flops import GIB
from model.preflight.compiler import Compiled, compile_order
from model.preflight.facts import CompileOrder

_STAGES = {
    "load": "loading the compiler",
    "trace": "tracing",
    "compile": "compiling, a minute or two",
    "analyse": "reading the program",
}


class Progress:
    """Compiles orders and says so."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._count = 0

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._status = self._console.status("preflight")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()

    def compile(self, what: str, order: CompileOrder) -> Compiled:
        """The outcome of an order, from disk where it was compiled before."""
        return self._compile(what, order, use_cache=True)

    def compile_afresh(self, what: str, order: CompileOrder) -> Compiled:
        """The same, always compiled."""
        return self._compile(what, order, use_cache=False)

    def _compile(self, what: str, order: CompileOrder, *, use_cache: bool) -> Compiled:
        self._count += 1
        started = time.monotonic()
        label = f"compile {self._count}: {order.num_slices} x {order.slice_name}, {what}"

        told: list[str] = []

        def on_stage(stage: str) -> None:
            if self._status is not None:
                self._status.update(f"{label}: {_STAGES.get(stage, stage)}")
            elif not told:  # of several slices a second program is compiled
                told.append(stage)
                self._console.print(f"{label} ...", markup=False, highlight=False, soft_wrap=True)

        compiled = compile_order(order, on_stage, use_cache=use_cache)
        if not compiled.from_cache:
            facts, evaluation = compiled.outcome.facts, compiled.outcome.evaluation
            how = "no program" if facts is None else f"{facts.roofline.step_seconds:.3g} s a step at best"
            if evaluation is not None:
                how = f"{evaluation.total / GIB:.3g} GiB"
            seconds = time.monotonic() - started
            self._console.print(f"{label}: {how}, compiled in {seconds:.0f} s", markup=False, highlight=False, soft_wrap=True)
        return compiled
