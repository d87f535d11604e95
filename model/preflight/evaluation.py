"""Whether the evaluation of a configured job fits beside the state that it trains: what a preflight of its train step leaves open."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from model.batch_arithmetic import BatchArithmetic
from model.config_base import Config
from model.flops import CHIPS, GIB
from model.preflight.compiler import Compiled
from model.preflight.facts import CompileOrder
from model.preflight.search import CompilerRefused
from model.preflight.settings import Job, replace_train
from model.slices import slice_named


class EvaluationFit(Config):
    """An evaluation on its slices, while weights and optimizer state of the training lie there."""

    job: str
    accelerator: str
    num_slices: int
    rows: int = Field(description="Sequences of one batch of held-out text, over all chips.")
    per_device: int = Field(description="Of them on a chip, or on a group of chips that sees the same rows.")
    fits: bool
    hbm_gib_per_chip: float | None = Field(description="None where the compiler made no program and gave no number.")
    hbm_usable_gib: float

    def __str__(self) -> str:
        """For people, with what to do where it does not fit."""
        where = f"{self.num_slices} x {self.accelerator}" if self.num_slices > 1 else self.accelerator
        needs = "more" if self.hbm_gib_per_chip is None else f"{self.hbm_gib_per_chip:.2f}"
        said = f"the evaluation of {self.job} on {where}, {self.per_device} sequence(s) a chip,"
        if self.fits:
            return f"{said} fits: {needs} of {self.hbm_usable_gib:.2f} GiB"
        remedy = f"set train.per_device_eval_parallelism={self.per_device // 2}" if self.per_device > 1 else "use a larger slice"
        return f"{said} does NOT fit: it needs {needs} of {self.hbm_usable_gib:.2f} GiB, and the run would end at its first one: {remedy}"


def evaluation_fit(job: Job, compile_program: Callable[[str, CompileOrder], Compiled]) -> EvaluationFit:
    """Compiles the evaluation with the job's own remat policy, microbatches and mesh.

    compile_program: as `model.preflight.search.Search` takes it.

    Raises:
        ValueError: the batch does not divide over the chips, or the model's code does not take the configuration.
        CompilerRefused: the compiler makes no program, for a reason that is not HBM.
    """
    assert job.train.accelerator_type is not None
    tpu_slice, count = slice_named(job.train.accelerator_type), job.train.slice_count
    job = replace_train(job, data_parallel_size=job.data)
    batch = BatchArithmetic.of(job.train, tpu_slice.num_chips * count)
    rows = batch.eval_rows(job.train)
    per_device = rows // (batch.data * batch.fsdp)
    order = CompileOrder(
        model=job.model,
        train=job.train,
        slice_name=tpu_slice.name,
        num_slices=count,
        compiler_options={},
        program="evaluation",
    )
    outcome = compile_program(f"evaluation, {per_device} sequence(s) a chip", order).outcome
    failure, needed = outcome.failure, None if outcome.evaluation is None else outcome.evaluation.total
    if failure is not None:
        if failure.kind == "invalid":
            raise ValueError(failure.message)
        if failure.kind == "refused":
            raise CompilerRefused(f"the TPU compiler refuses the evaluation: {failure.message}")
        needed = failure.hbm_bytes
    usable = CHIPS[tpu_slice.generation].usable_hbm_bytes
    return EvaluationFit(
        job=job.name,
        accelerator=tpu_slice.name,
        num_slices=count,
        rows=rows,
        per_device=per_device,
        fits=failure is None and needed is not None and needed <= usable,
        hbm_gib_per_chip=None if needed is None else needed / GIB,
        hbm_usable_gib=usable / GIB,
    )
