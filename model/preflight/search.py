"""The choice of remat policy, microbatches, mesh and compiler options: the fastest that fits, found with few compilations.

Arithmetic (`model.preflight.estimate`) ranks the settings and leaves out what cannot fit; the best is compiled, and what it turns
out to need corrects the arithmetic for the rest. The sets of compiler options are then tried at the best setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from model.flops import CHIPS
from model.preflight.compiler import Compiled
from model.preflight.compiler_flags import FlagChoice, FlagSet, flag_choice
from model.preflight.estimate import Estimate, estimate
from model.preflight.facts import CompileOrder, CompileOutcome
from model.preflight.settings import Fixed, Job, Setting, settings_of
from model.slices import Slice

MOST_COMPILES = 8
# Halving a microbatch costs what no bound shows: narrower products, more turns of the loop. How much is assumed, not measured.
MICROBATCH_PENALTY = 0.03
# Bounds nearer than this are no reason to use more memory. Chosen so that the 7 billion job on v4-128 gives up 1.0 % for 1.4 GiB, and
# the 2 billion one does not give up 1.9 %.
SAME_SPEED = 0.015
NEARLY_FITS = 1.06  # another set of compiler options may save this much


class CompilerRefused(ValueError):
    """The compiler makes no program of the step, for a reason that is not HBM."""


@dataclass(frozen=True)
class Trial:
    """One compilation of the search."""

    setting: Setting
    flag_set: FlagSet
    estimate: Estimate
    outcome: CompileOutcome
    from_cache: bool
    compiler_options: dict[str, str] = field(default_factory=dict)  # the set's, and over them the job's own

    @property
    def hbm_bytes(self) -> int | None:
        """HBM a chip must have; None where the compiler gave no number. See `hbm_is_least`."""
        if self.outcome.facts is not None:
            return self.outcome.facts.memory.total
        return self.outcome.failure.hbm_bytes if self.outcome.failure is not None else None

    @property
    def hbm_is_least(self) -> bool:
        """Whether `hbm_bytes` is of temporaries alone, so that more is needed."""
        return self.outcome.failure is not None and self.outcome.failure.temporaries_only

    @property
    def memory_factor(self) -> float | None:
        """Measured over estimated memory, the state left out of both; None where the compiler gave no number."""
        if self.hbm_bytes is None:
            return None
        working = self.hbm_bytes - (0 if self.hbm_is_least else self.estimate.state_bytes)
        return max(working, 0.0) / self.estimate.working_bytes

    @property
    def refused(self) -> bool:
        """Whether something else than the memory needed is objected to, by the compiler or by the step's own code."""
        return self.outcome.failure is not None and self.outcome.failure.kind != "out_of_memory"

    @property
    def invalid(self) -> bool:
        """Whether the step's own code objects, to which no compiler option makes a difference."""
        return self.outcome.failure is not None and self.outcome.failure.kind == "invalid"

    @property
    def failure(self) -> str:
        """What the compiler said where it made no program."""
        return self.outcome.failure.message if self.outcome.failure is not None else ""

    @property
    def step_seconds(self) -> float:
        """The bound; infinite where there is no program."""
        return self.outcome.facts.roofline.step_seconds if self.outcome.facts is not None else math.inf


@dataclass
class Search:
    """A search on one slice: its trials as they are made, and what was decided."""

    job: Job
    tpu_slice: Slice
    compile: Callable[[str, CompileOrder], Compiled]  # the text says what is compiled, for people
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    correction: float = 1.0  # measured over estimated memory, but for the state

    @property
    def usable(self) -> int:
        """HBM of a chip that a program can have, in bytes."""
        return CHIPS[self.tpu_slice.generation].usable_hbm_bytes

    @property
    def num_chips(self) -> int:
        """Over all slices."""
        return self.tpu_slice.num_chips * self.job.train.slice_count

    def fits(self, trial: Trial) -> bool:
        """Whether there is a program, and what it declares is no more than the chip has."""
        return trial.outcome.facts is not None and trial.outcome.facts.memory.total <= self.usable

    @property
    def best(self) -> Trial | None:
        """The fastest that fits; of those as fast as the fastest, the one that needs the least memory."""
        fitting = [trial for trial in self.trials if self.fits(trial)]
        fastest = min((trial.step_seconds for trial in fitting), default=math.inf)
        near = [trial for trial in fitting if trial.step_seconds <= fastest * (1 + SAME_SPEED)]
        return min(near, key=lambda trial: (trial.hbm_bytes or 0, trial.step_seconds), default=None)

    def run(self, fixed: Fixed) -> Trial | None:
        """Searches; None where nothing fits, and then `trials` end with the setting that needs the least memory.

        Raises:
            ValueError: no setting divides evenly, or none that was tried is one that the step's code takes.
            CompilerRefused: every setting that was tried is refused for a reason that is not HBM.
        """
        estimates = self._estimates(fixed)
        self._try_promising(estimates, MOST_COMPILES - 1)
        if self.best is None:
            least = min(self._possible(estimates), key=lambda setting: estimates[setting].hbm_bytes, default=None)
            if least is not None and not any(trial.setting == least for trial in self.trials):
                self._try_setting(least, estimates[least])
        self._raise_if_all_refused()
        if self.best is not None:
            self._try_other_flags(self.best, estimates)
        return self.best

    def promising(self, fixed: Fixed, most: int) -> Trial | None:
        """The first part of `run` alone, in about `most` compilations: what looks best is compiled, until something fits.

        Raises:
            ValueError: no setting divides evenly.
        """
        self._try_promising(self._estimates(fixed), most)
        return self.best

    def single(self, setting: Setting) -> Trial | None:
        """Compiles one setting with the first set of compiler options that is not refused; None where it does not fit.

        Raises:
            ValueError: it does not divide evenly, or the step's code does not take it.
            CompilerRefused: every set is refused for a reason that is not HBM.
        """
        setting.applied(self.job, self.num_chips)
        self._try_setting(setting, estimate(self.job, self.tpu_slice, setting))
        self._raise_if_all_refused()
        return self.best

    def _estimates(self, fixed: Fixed) -> dict[Setting, Estimate]:
        return {one: estimate(self.job, self.tpu_slice, one) for one in settings_of(self.job, self.tpu_slice, fixed)}

    def _try_promising(self, estimates: dict[Setting, Estimate], most: int) -> None:
        while (setting := self._next(estimates)) is not None and len(self.trials) < most:
            self._try_setting(setting, estimates[setting])

    def _possible(self, estimates: dict[Setting, Estimate]) -> list[Setting]:
        """Those without the ones that cannot work: refused with any options, or on a mesh that the step's code does not take."""
        made = {trial.setting for trial in self.trials if not trial.refused}
        refused = {trial.setting for trial in self.trials} - made
        meshes = {(trial.setting.context, trial.setting.tensor) for trial in self.trials if trial.invalid}
        return [one for one in estimates if one not in refused and (one.context, one.tensor) not in meshes]

    def _raise_if_all_refused(self) -> None:
        if not self.trials or not all(trial.refused for trial in self.trials):
            return
        compiled = [trial for trial in self.trials if not trial.invalid]
        if not compiled:
            raise ValueError(self.trials[0].failure)
        raise CompilerRefused(f"{compiled[-1].setting}: the TPU compiler refuses this step: {compiled[-1].failure}")

    def _next(self, estimates: dict[Setting, Estimate]) -> Setting | None:
        """The most promising setting that is not tried: predicted to fit, and to be faster than what fits already."""
        tried = {trial.setting for trial in self.trials}
        possible = [one for one in self._possible(estimates) if estimates[one].corrected_bytes(self.correction) <= self.usable]
        fitting = {one: score(one, estimates[one]) for one in possible}
        least_split = min((one.context * one.tensor for one in fitting), default=1)  # splitting finer costs, so only where it must be
        best = self.best
        limit = math.inf if best is None else score(best.setting, estimates[best.setting])
        untried = {
            one: value for one, value in fitting.items() if one not in tried and value < limit and one.context * one.tensor == least_split
        }
        return min(untried, key=lambda one: untried[one], default=None)

    def _try_setting(self, setting: Setting, estimated: Estimate) -> None:
        """Compiles with the first set of options that the compiler takes, and the next one where that nearly fits. All may be refused."""
        choice = self._flag_choice(setting)
        for flag_set in choice.compared + choice.fallbacks:
            trial = self._trial(setting, flag_set, estimated)
            if trial.invalid:
                return
            if trial.refused:
                continue
            if trial.memory_factor is not None:
                self.correction = trial.memory_factor
            if self.fits(trial) or (trial.hbm_bytes or math.inf) > NEARLY_FITS * self.usable or flag_set not in choice.compared:
                return

    def _try_other_flags(self, best: Trial, estimates: dict[Setting, Estimate]) -> None:
        tried = {trial.flag_set.name for trial in self.trials if trial.setting == best.setting}
        for flag_set in self._flag_choice(best.setting).compared:
            if flag_set.name not in tried:
                self._trial(best.setting, flag_set, estimates[best.setting])

    def _flag_choice(self, setting: Setting) -> FlagChoice:
        tokens_at_once = self.job.tokens_per_step / self.num_chips / setting.microbatches
        return flag_choice(self.tpu_slice.generation, tokens_at_once * self.job.model.intermediate_dim * self.job.compute_bytes)

    def _trial(self, setting: Setting, flag_set: FlagSet, estimated: Estimate) -> Trial:
        job = setting.applied(self.job, self.num_chips)
        options = flag_set.options | job.train.compiler_options
        order = CompileOrder(
            model=job.model,
            train=job.with_batch(job.batch_size).train,
            slice_name=self.tpu_slice.name,
            num_slices=job.train.slice_count,
            compiler_options=options,
        )
        compiled = self.compile(f"{setting}, options {flag_set.name}", order)
        trial = Trial(setting, flag_set, estimated, compiled.outcome, compiled.from_cache, options)
        self.trials.append(trial)
        if trial.refused and any(name in trial.failure for name in job.train.compiler_options):
            raise ValueError(f"train.compiler_options={job.train.compiler_options}: {trial.failure}")
        if trial.invalid:
            self.notes.append(f"{self.tpu_slice.name}, {setting}: no such step: {trial.failure}")
        elif trial.refused:
            self.notes.append(f"{self.tpu_slice.name}, {setting}: the compiler refuses its options {flag_set.name}: {trial.failure}")
        return trial


def tightest(search: Search) -> Trial:
    """Of a search that found nothing that fits, the trial that needs the least memory."""
    return min(search.trials, key=lambda trial: trial.hbm_bytes or math.inf)


def score(setting: Setting, estimated: Estimate) -> float:
    """Estimated seconds of a step, with what many microbatches cost beyond any bound."""
    return estimated.step_seconds * (1 + MICROBATCH_PENALTY) ** math.log2(setting.microbatches)
