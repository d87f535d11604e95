"""What a job that does not fit would fit with: found by arithmetic, and compiled before anyone is told so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.preflight.compiler import Compiled, CompilerCrash
from model.preflight.estimate import estimate
from model.preflight.facts import CompileOrder
from model.preflight.search import Search, Trial, tightest
from model.preflight.settings import Fixed, Setting

MOST_TRIES = 3  # compilations for each remedy, about
SAFE = 0.92  # share of the usable HBM up to which an estimate is worth compiling


@dataclass(frozen=True)
class Remedies:
    """Compiled steps that fit; None where none was found, or none looked for."""

    setting: Trial | None = None  # of the same job
    batch: tuple[int, Trial] | None = None  # sequences in the batch, and the job's own setting with them


def find_remedies(search: Search, fixed: Fixed) -> Remedies:
    """For a search that found nothing that fits, with what it could not choose; a compiler that fails is noted in the search.

    Raises:
        OSError: this machine has no room for the compiler's files.
    """
    if search.best is not None or not search.trials:
        return Remedies()
    setting = batch = None
    try:
        if fixed != Fixed():
            other = Search(search.job, search.tpu_slice, _asking("another setting", search), correction=search.correction)
            setting = other.promising(Fixed(), MOST_TRIES)
        batch = _smaller_batch(search, tightest(search))
    except (ValueError, CompilerCrash) as error:
        search.notes.append(f"advice is not complete: {error}")
    return Remedies(setting, batch)


def largest_batch(search: Search, setting: Setting, correction: float, below: int) -> int:
    """Sequences, fewer than `below`, with which the setting fits by corrected estimate: a multiple of what the mesh needs, or 0."""
    unit = search.num_chips // (setting.context * setting.tensor) * setting.microbatches
    low, high = 0, (below - 1) // unit
    while low < high:
        middle = (low + high + 1) // 2
        made = estimate(search.job.with_batch(middle * unit), search.tpu_slice, setting)
        if made.corrected_bytes(correction) <= SAFE * search.usable:
            low = middle
        else:
            high = middle - 1
    return low * unit


def _smaller_batch(search: Search, chosen: Trial) -> tuple[int, Trial] | None:
    """Sequences with which the chosen setting fits, as many as the arithmetic allows once it is corrected."""
    correction, below = chosen.memory_factor or 1.0, search.job.batch_size
    for _ in range(MOST_TRIES):
        below = largest_batch(search, chosen.setting, correction, below)
        if below == 0:
            return None
        smaller = Search(search.job.with_batch(below), search.tpu_slice, _asking(f"batch {below}", search))
        if (trial := smaller.single(chosen.setting)) is not None:
            return below, trial
        correction = smaller.correction
    return None


def _asking(what: str, search: Search) -> Callable[[str, CompileOrder], Compiled]:
    """The search's compiler, which tells people what is tried."""
    return lambda setting, order: search.compile(f"would {what} fit? {setting}", order)
