"""The steps of many runs as one graph: shared ones once, so many runs at a time, and a failure ends only what needs it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from prefect.futures import PrefectFuture

from flows.train_flow import submit
from tasks.artifacts import Artifact
from tasks.children import allow_children, stop_children
from tasks.pipeline import label
from tasks.planning import Plan
from tasks.steps import Step

DATA_STEPS_AT_ONCE = 4
DATA_KINDS = ("raw", "tokenizers", "tokens", "mixtures")


class RunSchedule:
    """Submits the steps of several plans as their inputs are ready.

    At most `max_concurrent` steps that train or export are under way at once, and a few of the data's. Runs earlier in the list go first.
    """

    def __init__(self, plans: Sequence[Plan], max_concurrent: int, changed: Callable[[int, str, str], None]) -> None:
        """`changed(number of the plan, "running" | "finished" | "failed", why)` is called for every run, in this thread."""
        self._plans, self._most, self._changed = plans, max_concurrent, changed
        self._futures: dict[str, PrefectFuture[Artifact]] = {}
        self._done: set[str] = set()
        self._failed: dict[str, str] = {}
        self._under_way: dict[str, Step] = {}
        self._left = set(range(len(plans)))
        self._begun: set[int] = set()
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self) -> None:
        """Returns when every run has finished or failed. Whatever else ends this call stops the children first."""
        allow_children()
        try:
            self._start_what_can()
            while self._under_way:
                self._end(self._ended.get())
                self._start_what_can()
        except BaseException:
            stop_children()
            for fingerprint in self._under_way:
                self._futures[fingerprint].wait()
            raise

    def _start_what_can(self) -> None:
        for number in sorted(self._left):
            self._settle(number)
        for number in sorted(self._left):
            for step in self._plans[number].wanted:
                if step.fingerprint not in self._futures and self._is_ready(step) and self._has_room(step):
                    self._start(step, number)

    def _is_ready(self, step: Step) -> bool:
        return all(upstream.fingerprint in self._done for upstream in step.upstream)

    def _has_room(self, step: Step) -> bool:
        data = step.kind in DATA_KINDS
        same = sum((other.kind in DATA_KINDS) == data for other in self._under_way.values())
        return same < (DATA_STEPS_AT_ONCE if data else self._most)

    def _start(self, step: Step, number: int) -> None:
        if step.kind not in DATA_KINDS and number not in self._begun:
            self._begun.add(number)
            self._changed(number, "running", "")
        future = submit(step, self._plans[number], self._futures)
        self._futures[step.fingerprint] = future
        self._under_way[step.fingerprint] = step
        future.add_done_callback(lambda _: self._ended.put(step.fingerprint))

    def _end(self, fingerprint: str) -> None:
        step = self._under_way.pop(fingerprint)
        try:
            self._futures[fingerprint].result()
        except Exception as error:  # it is told in the table; the other runs go on
            self._failed[fingerprint] = f"{label(step)}: {error}"
        else:
            self._done.add(fingerprint)

    def _settle(self, number: int) -> None:
        """Tells the end of a run all of whose steps are done, or one of whose steps failed."""
        steps = [step.fingerprint for step in self._plans[number].wanted]
        failed = [self._failed[each] for each in steps if each in self._failed]
        if failed or all(each in self._done for each in steps):
            self._left.discard(number)
            self._changed(number, "failed" if failed else "finished", failed[0] if failed else "")
