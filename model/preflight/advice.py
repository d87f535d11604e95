"""What to do about what a preflight found: a job that does not fit, a slice that is wrong for the job, a mesh worth knowing of.

Everything is computed. What is said to fit was compiled; all else is an estimate, corrected by what the compiled step showed, and is
called one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from model.flops import CHIPS, GIB
from model.preflight.estimate import MEMORY_MARGIN, Estimate, estimate
from model.preflight.prices import cost
from model.preflight.remedies import SAFE, Remedies, largest_batch
from model.preflight.roofline import Roofline
from model.preflight.search import Search, Trial, score
from model.preflight.settings import Fixed, Job, Setting, on_slice, settings_of
from model.slices import SLICES, Generation, Slice

OFF_BY = f"memory may be up to {MEMORY_MARGIN - 1:.0%} more"
WELL_USED = 0.8  # computation's share of a step from which a slice suits the job


@dataclass(frozen=True)
class Correction:
    """Compiled over estimated, by quantity: memory beside the state for any chip, traffic for chips of the generation compiled for."""

    generation: Generation
    memory: float = 1.0
    hbm: float = 1.0
    ici: float = 1.0
    ici_exposed: float | None = None  # share of the collectives; None leaves the estimate's

    @classmethod
    def of(cls, trial: Trial, tpu_slice: Slice) -> Correction:
        """What one compiled step showed."""
        memory = trial.memory_factor or 1.0
        if trial.outcome.facts is None:
            return cls(tpu_slice.generation, memory)
        bounds, made = trial.outcome.facts.roofline, trial.estimate
        ici = bounds.ici_seconds / made.ici_seconds if made.ici_seconds else 1.0
        exposed = bounds.exposed_ici_seconds / bounds.ici_seconds if bounds.ici_seconds else None
        return cls(tpu_slice.generation, memory, bounds.hbm_seconds / made.hbm_seconds, ici, exposed)

    def applied(self, made: Estimate, generation: Generation) -> Estimate:
        """The estimate for a chip of `generation`, corrected."""
        made = replace(made, hbm_bytes=made.corrected_bytes(self.memory))
        if generation != self.generation:
            return made
        return replace(
            made,
            hbm_seconds=made.hbm_seconds * self.hbm,
            ici_seconds=made.ici_seconds * self.ici,
            ici_exposed=made.ici_exposed if self.ici_exposed is None else self.ici_exposed,
        )


@dataclass(frozen=True)
class Option:
    """A slice on which the job would run, with its fastest setting that fits, by estimate."""

    tpu_slice: Slice
    setting: Setting
    estimate: Estimate
    dollars: float  # of the whole job, on demand, at the bound

    @property
    def well_used(self) -> bool:
        """Whether computation takes most of the step."""
        return self.estimate.compute_seconds >= WELL_USED * self.estimate.step_seconds


def advice(search: Search, chosen: Trial, remedies: Remedies | None = None) -> Iterator[str]:
    """Sentences, the most important first. remedies: what was compiled for a job that does not fit; None leaves it to estimates."""
    correction = Correction.of(chosen, search.tpu_slice)
    if search.best is None:
        yield from _does_not_fit(search, chosen, correction, remedies)
        return
    yield from _wrong_slice(search, chosen, correction)
    if chosen.setting.context > search.job.train.context_parallel_size:
        yield f"each sequence is split over {chosen.setting.context} chips: train.context_parallel_size={chosen.setting.context}"
    if chosen.setting.tensor > search.job.train.tensor_parallel_size:
        yield (
            f"{search.job.batch_size} sequences are too few for {search.num_chips} chips, so heads and feed-forward are split "
            f"over {chosen.setting.tensor}, which costs traffic in every layer: a multiple of {search.num_chips} would need none"
        )


def _does_not_fit(search: Search, chosen: Trial, correction: Correction, remedies: Remedies | None) -> Iterator[str]:
    usable = f"{search.usable / GIB:.2f} GiB usable HBM per chip of {search.tpu_slice.name}"
    if chosen.hbm_bytes is None:
        yield f"{chosen.setting} needs more than the {usable}"
    else:
        yield f"{chosen.setting} needs {'at least ' if chosen.hbm_is_least else ''}{chosen.hbm_bytes / GIB:.2f} GiB of {usable}"
    found = list(_estimated(search, chosen, correction) if remedies is None else _compiled(search, remedies))
    yield from found
    roomier = list(_smallest_that_fit(search.job, correction))
    if roomier:
        names = ", ".join(f"{option.tpu_slice.name} ({option.setting})" for option in roomier)
        yield f"the smallest slices that would hold it, by estimate ({OFF_BY}): {names}"
    elif not found:
        yield "no slice of the catalogue would hold it with one sequence per chip: shorten the sequence or make the model smaller"


def _compiled(search: Search, remedies: Remedies) -> Iterator[str]:
    if (trial := remedies.setting) is not None:
        yield f"it fits with {_flags(trial.setting, search.job)}: {_gib(trial)}, compiled"
    if remedies.batch is not None:
        batch, trial = remedies.batch
        yield f"with {trial.setting} a smaller batch fits: --batch {batch}, {_gib(trial)}, compiled"


def _estimated(search: Search, chosen: Trial, correction: Correction) -> Iterator[str]:
    free = _estimates(search.job, search.tpu_slice, correction)
    best = _fastest({setting: made for setting, made in free.items() if setting != chosen.setting}, SAFE * search.usable)
    if best is not None:
        about = f"about {free[best].hbm_bytes / GIB:.1f} GiB ({OFF_BY})"
        yield f"by estimate it would fit with {_flags(best, search.job)}: {about}, not compiled"
    batch = largest_batch(search, chosen.setting, correction.memory, search.job.batch_size)
    if batch:
        yield f"by estimate ({OFF_BY}) {chosen.setting} would fit with a smaller batch: about --batch {batch}, not compiled"


def _gib(trial: Trial) -> str:
    return f"{(trial.hbm_bytes or 0) / GIB:.2f} GiB"


def _fastest(estimates: dict[Setting, Estimate], room: float) -> Setting | None:
    """Of the settings that need no more than `room` bytes; None where none does."""
    fitting = [setting for setting, made in estimates.items() if made.hbm_bytes <= room]
    return min(fitting, key=lambda setting: score(setting, estimates[setting]), default=None)


def _flags(setting: Setting, job: Job) -> str:
    """The command-line flags of a setting."""
    parts = [f"--remat {setting.remat}", f"--microbatches {setting.microbatches}"]
    for name, size, before in (
        ("context", setting.context, job.train.context_parallel_size),
        ("tensor", setting.tensor, job.train.tensor_parallel_size),
    ):
        if size != before:
            parts.append(f"--train.{name}-parallel-size {size}")
    return " ".join(parts)


def _wrong_slice(search: Search, chosen: Trial, correction: Correction) -> Iterator[str]:
    facts = chosen.outcome.facts
    if facts is None or facts.roofline.compute_seconds >= WELL_USED * facts.roofline.step_seconds:
        return
    bounds = facts.roofline
    limits = _limits(bounds)
    name, slices = search.tpu_slice.name, search.job.train.slice_count
    where = f"{search.num_chips} {search.tpu_slice.generation} chips" + (f" in {slices} slices" if slices > 1 else "")
    text = (
        f"{search.job.name} on {where} is {' and '.join(f'{unit}-bound' for unit in limits)}: "
        f"{', '.join(_reason(unit, search, bounds) for unit in limits)}, and computation is "
        f"{bounds.compute_seconds / bounds.step_seconds:.0%} of the step"
    )
    options = list(_options(search.job, correction, search.tpu_slice.generation))
    smaller = [option for option in options if option.tpu_slice.num_chips < search.num_chips and option.tpu_slice.name != name]
    suited = [option for option in smaller if option.well_used]
    fastest = max(suited, key=lambda option: option.tpu_slice.num_chips, default=None)
    if fastest is None:
        fastest = max(smaller, key=lambda option: option.estimate.compute_seconds / option.estimate.step_seconds, default=None)
    if fastest is not None:
        text += f"; use {fastest.tpu_slice.num_chips} ({fastest.tpu_slice.name}), by estimate: {_worth(fastest)}"
    yield text
    others = [option for option in _options(search.job, correction) if option.well_used and option.tpu_slice.name != name]
    if others:
        cheapest = min(others, key=lambda option: option.dollars)
        quickest = min(others, key=lambda option: option.estimate.step_seconds)
        for what, option in (("cheapest", cheapest), ("fastest", quickest)):
            yield f"the {what} slice that computation bounds, by estimate: {option.tpu_slice.name}, {_worth(option)}"


def _reason(unit: str, search: Search, bounds: Roofline) -> str:
    """The figures from which a unit limits the step."""
    if unit == "HBM":
        chip = CHIPS[search.tpu_slice.generation]
        intensity, ridge = bounds.executed_flops_per_chip / bounds.hbm_bytes_per_chip, chip.bf16_flops / chip.hbm_bytes_per_second
        tokens = search.job.tokens_per_step / search.num_chips
        return f"{tokens:,.0f} tokens a chip give {intensity:,.0f} FLOP per byte of HBM where {chip.name} needs {ridge:,.0f}"
    sent, seconds = (bounds.dcn_bytes_per_chip, bounds.dcn_seconds) if unit == "DCN" else (bounds.ici_bytes_per_chip, bounds.ici_seconds)
    hidden = "" if unit == "DCN" else f" ({bounds.exposed_ici_seconds * 1e3:,.1f} exposed)"
    products = f"{bounds.compute_seconds * 1e3:,.1f} ms of products"
    return f"{sent / 1e9:,.2f} GB over {unit} take a chip {seconds * 1e3:,.1f} ms{hidden} beside {products}"


def _limits(bounds: Roofline) -> list[str]:
    """The units that need longer than computation does; where none alone does, the one that adds most to it."""
    alone = {"HBM": bounds.hbm_seconds, "ICI": bounds.ici_seconds, "DCN": bounds.dcn_seconds}
    longer = [unit for unit, seconds in alone.items() if seconds > bounds.compute_seconds]
    if longer:
        return longer
    added = {"HBM": bounds.on_chip_seconds - bounds.compute_seconds, "ICI": bounds.exposed_ici_seconds}
    return [max(added, key=lambda unit: added[unit])]


def _worth(option: Option) -> str:
    share = option.estimate.model_flops / (option.estimate.step_seconds * CHIPS[option.tpu_slice.generation].bf16_flops)
    return f"about {option.estimate.step_seconds:.2f} s a step, MFU bound {share:.2f}, ${option.dollars:,.0f}"


def _options(job: Job, correction: Correction, generation: Generation | None = None, *, splits: bool = False) -> Iterator[Option]:
    """Single slices, of one generation or all, on which the job fits; only with `splits` by splitting sequences or heads."""
    said = job.train.context_parallel_size * job.train.tensor_parallel_size
    for tpu_slice in SLICES.values():
        if generation not in (None, tpu_slice.generation) or any(
            stage.value % tpu_slice.num_chips for stage in job.train.batch_schedule.stages
        ):
            continue
        moved = on_slice(job, tpu_slice.name)
        made = _estimates(moved, tpu_slice, correction)
        if not splits:
            made = {setting: one for setting, one in made.items() if setting.context * setting.tensor == said}
        best = _fastest(made, SAFE * CHIPS[tpu_slice.generation].usable_hbm_bytes)
        if best is not None:
            hours = made[best].step_seconds * job.hours_per_step_second
            yield Option(tpu_slice, best, made[best], cost(tpu_slice, 1, hours).dollars)


def _smallest_that_fit(job: Job, correction: Correction) -> Iterable[Option]:
    """Of each generation; by splitting sequences or heads, as an option then says, where no slice holds it otherwise."""
    smallest: dict[Generation, Option] = {}
    for option in list(_options(job, correction)) or _options(job, correction, splits=True):
        known = smallest.get(option.tpu_slice.generation)
        if known is None or option.tpu_slice.num_chips < known.tpu_slice.num_chips:
            smallest[option.tpu_slice.generation] = option
    return smallest.values()


def _estimates(job: Job, tpu_slice: Slice, correction: Correction) -> dict[Setting, Estimate]:
    """Every setting of the job, nothing fixed; microbatches in powers of two are enough to advise."""
    try:
        settings = settings_of(job, tpu_slice, Fixed())
    except ValueError:
        return {}
    return {
        setting: correction.applied(estimate(job, tpu_slice, setting), tpu_slice.generation)
        for setting in settings
        if math.log2(setting.microbatches).is_integer() and setting.context * setting.tensor <= 8
    }
