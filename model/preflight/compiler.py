"""Compiling as the rest of preflight sees it: an order in, an outcome back, from disk or from a child process. No JAX here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from model.child import child_environment, events
from model.durable import write_json
from model.preflight import cache
from model.preflight.facts import CompileOrder, CompileOutcome
from model.preflight.topology import check_compiler
from model.preflight.workspace import workspace


class CompilerCrash(RuntimeError):
    """The compiling process died without an outcome; the message holds its last words."""


@dataclass(frozen=True)
class Compiled:
    """An outcome and where it came from."""

    outcome: CompileOutcome
    from_cache: bool


def compile_order(order: CompileOrder, on_stage: Callable[[str], None] = lambda stage: None, *, use_cache: bool = True) -> Compiled:
    """The outcome of an order. What was compiled before is read from disk; only what would come out again is kept there.

    on_stage: told "load", "trace", "compile", "analyse" as the child gets there; not called for a cached outcome.

    Raises:
        ValueError: there is no compiler on this machine, or it does not know the slice.
        CompilerCrash: the compiler took its process with it.
    """
    if use_cache and (outcome := cache.load(order)) is not None:
        return Compiled(outcome, from_cache=True)
    check_compiler()
    outcome = _in_child(order, on_stage)
    if use_cache and outcome.is_final:
        try:
            cache.store(order, outcome)
        except OSError as error:
            print(f"warning: {cache.cache_directory()} cannot be written ({error}): the next preflight compiles again", file=sys.stderr)
    return Compiled(outcome, from_cache=False)


def _in_child(order: CompileOrder, on_stage: Callable[[str], None]) -> CompileOutcome:
    with workspace() as directory:
        write_json(directory / "order.json", order.model_dump(mode="json"))
        with (directory / "stderr").open("w+", encoding="utf-8", errors="replace") as stderr:
            with subprocess.Popen(
                [sys.executable, "-m", "model.preflight.compile_step", str(directory)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=child_environment(),
            ) as process:
                try:
                    outcome = _follow(process, on_stage)
                except BaseException:
                    process.kill()
                    process.wait()  # it writes into the directory that is removed next
                    raise
            if outcome is None:
                raise CompilerCrash(_last_words(process.returncode, stderr))
            return outcome


def _follow(process: subprocess.Popen[str], on_stage: Callable[[str], None]) -> CompileOutcome | None:
    outcome: CompileOutcome | None = None
    assert process.stdout is not None
    for event in events(process.stdout):
        kind = event.pop("event", None)
        if kind == "stage":
            on_stage(str(event["name"]))
        elif kind == "error":
            raise ValueError(str(event["message"]))
        elif kind == "outcome":
            outcome = CompileOutcome.model_validate(event)
    process.wait()
    return outcome


def _last_words(status: int, stderr: TextIO) -> str:
    stderr.seek(0)
    tail = "".join(stderr.readlines()[-15:]).strip()
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    hint = " (killed by the system, most often for want of memory: a compile takes 2 to 4 GiB)" if status == -9 else ""
    return f"the TPU compiler ended with {how}{hint}: {tail or 'it printed nothing'}"
