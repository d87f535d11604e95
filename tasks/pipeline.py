"""From one run configuration to its steps: raw text -> tokenizer -> tokens -> mixture -> checkpoints -> Hugging Face directory."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tasks.config import RunConfig, TrainingStep
from tasks.data_steps import DataSteps, mixture_steps
from tasks.initial_weights import pin_initial_weights
from tasks.steps import Step


@dataclass(frozen=True)
class RunSteps:
    """The steps of one run; `all` has them in an order in which each comes after its inputs."""

    data: DataSteps
    training: Step
    export: Step

    @property
    def all(self) -> tuple[Step, ...]:
        """Every step, inputs first."""
        return in_dependency_order((self.export,))


def run_steps(config: RunConfig, *, unlisted: Collection[str] = ()) -> RunSteps:
    """The steps of a run. Reads the sources' content digests, downloads and computes nothing. `unlisted` is that of `mixture_steps`."""
    data = mixture_steps(config.data, config.tokenize, unlisted=unlisted)
    pinned, digest = pin_initial_weights(config.train)
    training = Step(
        kind="checkpoints",
        name=config.name,
        config=TrainingStep(
            model=config.model,
            train=pinned,
            initial_weights=digest,
            track=config.track,
            tags=config.tags,
            eval_tags=data.tags,
            pool=config.pool,
        ),
        upstream=(data.mixture,),
    )
    chosen = config.export
    if chosen.generation_eos_token_ids is None and config.train.hf_generation_eos_token_ids is not None:
        chosen = chosen.model_copy(update={"generation_eos_token_ids": config.train.hf_generation_eos_token_ids})
    export = Step(
        kind="hf",
        name=config.name,
        config=chosen,
        upstream=(training, data.mixture),
        code_version="2",
        subdirectory_of=training,
    )
    return RunSteps(data, training, export)


def in_dependency_order(targets: tuple[Step, ...]) -> tuple[Step, ...]:
    """The targets and everything they need, each once, inputs before what uses them."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        for upstream in step.upstream:
            visit(upstream)
        ordered.setdefault(step.fingerprint, step)

    for target in targets:
        visit(target)
    return tuple(ordered.values())


class StepsFailed(RuntimeError):
    """Steps of a run failed, and others were left because they need them; those that need neither went on."""

    def __init__(self, failed: Mapping[str, Exception], left: Sequence[str]) -> None:
        """`failed`: what each raised, by label, the first one first. `left`: labels."""
        self.failed, self.left = dict(failed), tuple(left)
        texts = [str(error) for error in failed.values()]
        others = [f"also {name}: {text}" for name, text in list(zip(failed, texts, strict=True))[1:] if text != texts[0]]
        because = [f"not run, because they need {'them' if len(failed) > 1 else 'it'}: {', '.join(left)}"] if left else []
        super().__init__("\n".join([texts[0], *others, *because]))


def label(step: Step) -> str:
    """How a person names a step: `tokens/plays`."""
    return f"{step.kind}/{step.name}"


def matching(steps: tuple[Step, ...], pattern: str, flag: str) -> tuple[Step, ...]:
    """The steps whose label the regular expression finds.

    Raises:
        ValueError: the pattern is no regular expression or matches no step; names the steps there are.
    """
    names = ", ".join(dict.fromkeys(label(step) for step in steps))
    try:
        found = tuple(step for step in steps if re.search(pattern, label(step)))
    except re.error as error:
        raise ValueError(f"{flag}={pattern!r} is not a regular expression ({error}); the steps are {names}") from None
    if not found:
        raise ValueError(f"{flag}={pattern!r} matches no step; the steps are {names}")
    return found
