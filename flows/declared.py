"""The runs that an experiment's file declares, with the flags of its command line: what they are, and which needs which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flows.command_line import Arguments, parse
from model.origin import Origin, after
from tasks.anneal import OF_ITS_BEGINNING, ContinuedRun
from tasks.config import RunConfig
from tasks.datasets import own_text_mixture
from tasks.pipeline import run_steps
from tasks.places import Place
from tasks.steps import Step


@dataclasses.dataclass(frozen=True)
class ExperimentArguments(Arguments):
    """Flags of an experiment's file; those of the configuration follow, by section, and change every run of the file.

    Of a run that goes on from another one they change what its `AnnealConfig` says: its own steps, the learning rate where it begins.
    """

    max_concurrent: int = 1
    """Runs at once. A step that several of them share is done once."""
    deploy: str | None = None
    """Make a Prefect deployment train-llama/NAME of each run on this work pool, instead of running it."""


@dataclasses.dataclass(frozen=True)
class Declared:
    """One run of the file with its flags. `begins`: the run whose last checkpoint it goes on from; `config` is then in its own terms."""

    config: RunConfig
    arguments: ExperimentArguments
    begins: ContinuedRun | None = None
    unchanged: tuple[str, ...] = ()
    """Fields that flags change in other runs, and not in this one, which goes on from another."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name

    @property
    def base(self) -> str | None:
        """The name of the run whose last checkpoint it goes on from."""
        return None if self.begins is None else self.begins.base.name

    def steps(self) -> tuple[Step, ...]:
        """Its steps by kind and name. No source is looked at, so they are good for nothing else."""
        unlisted = [dataset.name for dataset in self.config.data.datasets if dataset.has_files]
        return run_steps(_from_nothing(self.config), unlisted=unlisted).all

    def is_ready(self, root: Place) -> bool:
        """Whether what it goes on from is trained."""
        return self.begins is None or self.begins.is_ready(root)

    def whole(self, root: Place) -> RunConfig:
        """The run as it is trained, with the checkpoint that it begins with. Raises ValueError where what that one needs is not there."""
        return self.config if self.begins is None else self.begins.begun(root, self.config)

    def origin(self, root: Place) -> Origin | None:
        """Where it will begin; None where that is there to be read."""
        if self.begins is None or self.is_ready(root):
            return None
        base = self.begins.base
        return after(base.train, self.config.train, base.seq_len)

    def plannable(self, root: Place) -> RunConfig:
        """The run as far as it can be planned now."""
        return self.whole(root) if self.is_ready(root) else _from_nothing(self.whole(root))


def _from_nothing(config: RunConfig) -> RunConfig:
    train = config.train.model_copy(update={"initialize_from_checkpoint_path": None, "initialize_from_hf": None})
    return config.model_copy(update={"train": train})


def declared_runs(steps: Sequence[RunConfig | ContinuedRun], description: str, arguments: list[str]) -> list[Declared]:
    """The runs with their flags; one that others go on from comes before them, whether the file lists it or not.

    Raises:
        ValueError: there is none, two have one name, or one name is given to several.
    """
    runs: dict[str, Declared] = {}

    def _flagged(config: RunConfig, given: list[str] = arguments) -> tuple[RunConfig, ExperimentArguments]:
        flags = parse(ExperimentArguments(config=config), given, prog=config.name, description=description or "An experiment.")
        config = flags.config
        if flags.text:
            config = config.model_copy(update={"data": own_text_mixture(flags.text, config.data.tokenizer, flags.reading)})
        return config, flags

    def _add(name: str, made: Declared) -> Declared:
        other = runs.setdefault(name, made)
        if (other.config, other.base) != (made.config, made.base):
            raise ValueError(f"two runs of this file are named {name!r}: directories and trackers would mix them up, so rename one")
        return other

    for step in steps:
        if not isinstance(step, RunConfig | ContinuedRun):
            given = f"{step!r:.60}"
            raise ValueError(f"executor_main(steps=...) has {given}: give it a list of what default_train or anneal_after returned")
        if isinstance(step, RunConfig):
            _add(step.name, Declared(*_flagged(step)))
            continue
        base = _add(step.base.name, Declared(*_flagged(step.base)))
        others, unchanged = _apart(arguments, OF_ITS_BEGINNING)
        config, flags = _flagged(step.in_its_own_terms(), others)
        _add(step.name, Declared(config, flags, dataclasses.replace(step, base=base.config), unchanged))
    _check_names(runs)
    return list(runs.values())


def _apart(arguments: Sequence[str], fields: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The arguments without the flags of some training fields, and those of the fields that had one."""
    others: list[str] = []
    found: dict[str, None] = {}
    field = ""
    for argument in arguments:
        if argument.startswith("--"):
            field = argument.partition("=")[0].removeprefix("--train.").replace("-", "_")
        if field in fields:
            found[field] = None
        else:
            others.append(argument)
    return others, tuple(found)


def _check_names(runs: dict[str, Declared]) -> None:
    """Raises ValueError where there is no run, or --name would make several runs one."""
    if not runs:
        raise ValueError("executor_main(steps=[]) has nothing to run: give it what default_train returned")
    for name, run in runs.items():
        if run.name != name and len(runs) > 1:
            raise ValueError(
                f"--name={run.name!r} would name all {len(runs)} runs of this file alike ({', '.join(runs)}): leave it out; to rename one, "
                "change its name in the file"
            )
