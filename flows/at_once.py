"""Runs of one experiment's file: some at once, those that others fail to prepare left out, and what became of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from tasks.children import ChildStopped, stop_children
from tasks.pipeline import StepsFailed

T = TypeVar("T")
State = Literal["done", "failed", "stopped", "left out", "refused"]
_WHICH: dict[State, str] = {"failed": "failed", "stopped": "was stopped", "left out": "was left out", "refused": "was refused"}
_SHOWN = 100  # letters of an error in a table


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of a run. `why`: the error, or whom it waited for in vain; of steps that failed their names are known."""

    name: str
    state: State
    result: T | None = None
    why: str = ""
    failed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def row(self) -> tuple[str, str, str, str, str]:
        """`(run, state, steps that failed, steps that were left, why)`."""
        why = self.why.partition("\n")[0]
        return self.name, self.state, ", ".join(self.failed), ", ".join(self.left), why if len(why) <= _SHOWN else f"{why[:_SHOWN]} ..."


def run_all(jobs: Mapping[str, Callable[[], T]], needs: Mapping[str, str], most: int) -> list[Outcome[T]]:
    """Does every job, at most `most` at once, in their order; one that fails keeps back those alone that need it.

    Args:
        jobs: by name; those that are needed come before those that need them.
        needs: name -> the one job that has to be done before it.

    Ctrl-C stops the children of all jobs, which save; what had not begun does not begin.
    """
    outcomes: dict[str, Outcome[T]] = {}
    if most == 1:  # in this thread, which signals reach
        for name, job in jobs.items():
            outcomes[name] = _outcome(name, job, outcomes.get(needs.get(name, "")))
            if outcomes[name].state == "stopped":
                break
        return [outcomes.get(name) or Outcome(name, "stopped", why="it had not begun") for name in jobs]
    futures: dict[str, Future[Outcome[T]]] = {}
    with ThreadPoolExecutor(max_workers=most, thread_name_prefix="run") as pool:
        for name, job in jobs.items():
            # Threads take jobs in their order, so what is needed has begun before whoever waits for it.
            futures[name] = pool.submit(_after, name, job, futures.get(needs.get(name, "")))
        try:
            for future in futures.values():
                future.result()
        except KeyboardInterrupt:
            for future in futures.values():
                future.cancel()
            stop_children()
    return [Outcome(name, "stopped", why="it had not begun") if future.cancelled() else future.result() for name, future in futures.items()]


def left_out(name: str, needed: Outcome[T]) -> Outcome[T]:
    """The outcome of a run that needs another one, which is not done."""
    return Outcome(name, "left out", why=f"it needs {needed.name}, which {_WHICH[needed.state]}")


def _after(name: str, job: Callable[[], T], needed: Future[Outcome[T]] | None) -> Outcome[T]:
    return _outcome(name, job, None if needed is None else needed.result())


def _outcome(name: str, job: Callable[[], T], needed: Outcome[T] | None) -> Outcome[T]:
    if needed is not None and needed.state != "done":
        return left_out(name, needed)
    try:
        return Outcome(name, "done", job())
    except (KeyboardInterrupt, ChildStopped) as stop:
        return Outcome(name, "stopped", why=str(stop))
    except StepsFailed as error:
        return Outcome(name, "failed", why=str(error), failed=tuple(error.failed), left=error.left)
    except Exception as error:
        return Outcome(name, "failed", why=str(error))


def exit_status(outcomes: Sequence[Outcome[T]]) -> int:
    """0 all are done, 130 stopped on request, 1 something failed."""
    states = {outcome.state for outcome in outcomes}
    return 130 if "stopped" in states else int(states != {"done"})
