"""The command `python -m model.preflight PRESET --accelerator v4-128 [flags]`.

Exit status: 0 the job fits, 3 it does not, 2 the request was wrong, 1 the compiler failed, 130 or 143 it was interrupted.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ValidationError
from rich.console import Console

from model.batch_size_flag import batch_size_flags
from model.child import PARENT_VARIABLE, die_with_parent
from model.config import LlamaConfig, RematPolicy
from model.flops import num_parameters
from model.preflight.compiler import CompilerCrash
from model.preflight.evaluation import evaluation_fit
from model.preflight.prices import PricingModel
from model.preflight.progress import Progress
from model.preflight.remedies import find_remedies
from model.preflight.result import Preflight, result_of
from model.preflight.search import CompilerRefused, Search
from model.preflight.settings import Fixed, Job, replace_train, single_setting
from model.presets import JOBS, job_named
from model.slices import slice_named
from model.train_config import SimpleTrainConfig

FITS, FAILED, USAGE, DOES_NOT_FIT = 0, 1, 2, 3

# Fields that have a short flag, by which an error names them.
_FLAGS = {"train_batch_size": "--batch", "slice_count": "--num-slices", "train_seq_len": "--seq-len", "accelerator_type": "--accelerator"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Flags of one preflight; those of the model and of its training follow, by section."""

    model: LlamaConfig
    train: SimpleTrainConfig
    accelerator: str | None = None
    """TPU slice, by its Cloud TPU name: v4-128, v5e-256. Unset: train.accelerator_type."""
    num_slices: int | None = None
    """Slices joined by the data-center network. Unset: train.slice_count."""
    remat: RematPolicy | None = None
    """What the backward pass computes again. Unset: searched, unless model.gradient_checkpointing names a policy."""
    microbatches: int | None = None
    """Parts of the batch, one after the other. Unset: searched, unless train.per_device_parallelism is a number."""
    batch: int | None = None
    """Sequences in one step, over all chips."""
    seq_len: int | None = None
    """Tokens in one sequence."""
    price: PricingModel = "on_demand"
    """Which list price."""
    json: bool = False
    """Print JSON alone on standard output."""
    evaluation: bool = False
    """Compile the evaluation instead of the train step, with the job's own remat policy, microbatches and mesh."""
    no_search: bool = False
    """Compile one setting: what is given, else full remat, the batch at once."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw the roofline into this file too."""
    no_cache: bool = False
    """Compile again what was compiled before."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit status."""
    try:
        job, rest = _chosen_job(list(arguments))
        flags = tyro.cli(
            Arguments,
            args=rest,
            default=Arguments(model=job.model, train=job.train),
            prog=f"python -m model.preflight {job.name}",
            description="Compile a train step for a TPU slice without one: does it fit, how fast can it be, what does it cost.",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
            registry=batch_size_flags(),
        )
        return _preflight(_job(job.name, flags), flags)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            where = ".".join(_FLAGS.get(str(part), str(part)) for part in problem["loc"])
            print(f"error: {where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return USAGE
    except (CompilerRefused, CompilerCrash) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE


def _chosen_job(arguments: list[str]) -> tuple[Job, list[str]]:
    """The job that the first argument names, or `--job FILE` holds, and the other arguments."""
    arguments = [part for one in arguments for part in (("--job", one[6:]) if one.startswith("--job=") else (one,))]
    if "--job" in arguments:
        if PARENT_VARIABLE in os.environ:
            die_with_parent()
        place = arguments.index("--job")
        if place + 1 == len(arguments):
            raise ValueError("--job needs a file: JSON with name, model and train")
        job = Job.model_validate_json(Path(arguments[place + 1]).read_text(encoding="utf-8"))
        return job, arguments[:place] + arguments[place + 2 :]
    if arguments and not arguments[0].startswith("-"):
        return job_named(arguments[0]), arguments[1:]
    if {"-h", "--help"} & set(arguments):
        return next(iter(JOBS.values())), arguments
    raise ValueError(f"which job? python -m model.preflight PRESET --accelerator v4-128; the presets are {', '.join(JOBS)}")


def _job(name: str, flags: Arguments) -> Job:
    """The job with the short flags applied.

    Raises:
        ValueError: no accelerator, or one that is not in the catalogue; a model without a vocabulary.
    """
    changed = {
        "accelerator_type": flags.accelerator,
        "slice_count": flags.num_slices,
        "train_batch_size": flags.batch,
        "train_seq_len": flags.seq_len,
    }
    model = flags.model
    if flags.seq_len is not None:
        model = model.model_copy(update={"seq_len": max(flags.seq_len, model.seq_len)})
    job = Job(name=name, model=model, train=flags.train)
    job = replace_train(job, **{field: value for field, value in changed.items() if value is not None})
    if not job.train.accelerator_type:
        raise ValueError("on which slice? give --accelerator, such as --accelerator v4-128")
    if job.seq_len > job.model.seq_len:
        raise ValueError(f"train.train_seq_len={job.seq_len} is longer than model.seq_len={job.model.seq_len}: use --seq-len {job.seq_len}")
    num_parameters(job.model)
    return job


def _preflight(job: Job, flags: Arguments) -> int:
    assert job.train.accelerator_type is not None
    tpu_slice = slice_named(job.train.accelerator_type)
    num_chips = tpu_slice.num_chips * job.train.slice_count
    if flags.plot is not None:
        _check_plot(flags.plot)
    console = Console(stderr=True)
    with Progress(console) as progress:
        compile_program = progress.compile if not flags.no_cache else progress.compile_afresh
        if flags.evaluation:
            fit = evaluation_fit(job, compile_program)
            print(fit.model_dump_json(indent=1) if flags.json else fit)
            return FITS if fit.fits else DOES_NOT_FIT
        search = Search(job, tpu_slice, compile_program)
        fixed = Fixed.of(job, num_chips, remat=flags.remat, microbatches=flags.microbatches)
        remedies = None
        if flags.no_search:
            search.single(single_setting(job, fixed))
        elif search.run(fixed) is None:
            remedies = find_remedies(search, fixed)
    found = result_of(search, flags.price, remedies)
    if flags.plot is not None:
        _plot(found, flags.plot)
    _print(found, as_json=flags.json)
    return FITS if found.fits else DOES_NOT_FIT


def _check_plot(path: Path) -> None:
    """Raises ValueError where no file can be written at `path`."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written: {error.strerror}; give a file in a directory that exists") from error
    if path.is_dir():
        raise ValueError(f"--plot {path} is a directory: give the name of a file, such as {path / 'roofline.png'}")


def _plot(found: Preflight, path: Path) -> None:
    from model.preflight.plot import write_png

    if found.step_seconds is None:
        print(f"warning: no program, so nothing to draw into {path}", file=sys.stderr)
        return
    write_png(found, path)


def _print(found: Preflight, *, as_json: bool) -> None:
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    from model.preflight.report import print_report

    print_report(found, Console(highlight=False, soft_wrap=True))
