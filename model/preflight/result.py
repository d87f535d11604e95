"""What a preflight found: the JSON that `--json` prints, with the names that others read."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from model.config import RematPolicy
from model.config_base import Config
from model.flops import GIB, train_flops_per_token
from model.preflight.advice import advice
from model.preflight.facts import CollectiveTotal, CompileFacts
from model.preflight.prices import PRICES, PRICING_PAGE, PricingModel, cost
from model.preflight.remedies import Remedies
from model.preflight.search import Search, Trial, tightest
from model.preflight.settings import Job
from model.slices import Slice


class TrialSummary(Config):
    """One compilation of the search."""

    remat: RematPolicy
    microbatches: int
    context: int
    tensor: int
    flags: str
    hbm_gib_per_chip: float | None
    step_seconds: float | None
    failure: str | None
    from_cache: bool


class Preflight(Config):
    """A job on its slices. FLOPs, bytes and GiB are per chip and step; figures are None where the compiler made no program.

    MFU counts causal attention at half, as `model_flops_per_chip` does, unless the name says otherwise. Times are bounds that
    no run beats, not forecasts; hours and dollars follow from them.
    """

    job: str
    accelerator: str
    num_slices: int
    num_chips: int
    num_hosts: int
    train_batch_size: int
    seq_len: int
    num_train_steps: int

    fits: bool
    hbm_gib_per_chip: float | None = Field(description="Arguments, temporaries and code as the compiler declares them.")
    hbm_assigned_gib_per_chip: float | None = Field(description="What its buffer assignment lays out: less, by reuse.")
    hbm_usable_gib: float
    hbm_is_least: bool = Field(description="Whether hbm_gib_per_chip is what temporaries alone would take: at least so much is needed.")

    remat: RematPolicy
    microbatches: int
    mesh: dict[str, int]
    flags: str
    compiler_options: dict[str, str] = Field(description="Of the set that `flags` names, and over them train.compiler_options.")
    gradient_sum_dtype: str
    attention: str | None

    model_flops_per_chip: float | None = None
    executed_flops_per_chip: float | None = None
    recomputation: float | None = Field(default=None, description="Executed over model FLOPs.")
    hbm_bytes_per_chip: float | None = None
    ici_bytes_per_chip: float | None = None
    dcn_bytes_per_chip: float | None = None
    ici_async_share: float | None = None
    all_gather_async_share: float | None = None
    collectives: tuple[CollectiveTotal, ...] = ()
    logits_arrays: int | None = Field(
        default=None, description="Arrays as large as all logits of a microbatch, of any shape, in the program."
    )

    bound: str | None = None
    compute_seconds: float | None = None
    hbm_seconds: float | None = None
    on_chip_seconds: float | None = None
    ici_seconds: float | None = None
    exposed_ici_seconds: float | None = None
    dcn_seconds: float | None = None
    mfu_bound_hidden: float | None = None
    mfu_bound_exposed: float | None = None
    mfu_bound_exposed_by_colors: float | None = None
    mfu_bound_exposed_full_attention: float | None = None
    step_seconds: float | None = None
    tokens_per_second_per_chip: float | None = None

    hours: float | None = None
    dollars: float | None = None
    price: dict[str, str | float]

    compile_cpu_seconds: float | None = None
    lower_cpu_seconds: float | None = None
    process_cpu_seconds: float | None = None
    peak_rss_gib: float | None = None
    trials: tuple[TrialSummary, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...]


def result_of(search: Search, pricing: PricingModel, remedies: Remedies | None = None) -> Preflight:
    """The result of a search that is over. remedies: what was compiled to advise of, where the job does not fit."""
    job, tpu_slice = search.job, search.tpu_slice
    chosen = search.best or tightest(search)
    facts = chosen.outcome.facts
    applied = chosen.setting.applied(job, search.num_chips)
    declared = chosen.hbm_bytes
    return Preflight(
        job=job.name,
        accelerator=tpu_slice.name,
        num_slices=job.train.slice_count,
        num_chips=search.num_chips,
        num_hosts=tpu_slice.num_hosts * job.train.slice_count,
        train_batch_size=job.batch_size,
        seq_len=job.seq_len,
        num_train_steps=job.train.num_train_steps,
        fits=search.best is not None,
        hbm_gib_per_chip=None if declared is None else declared / GIB,
        hbm_assigned_gib_per_chip=None if facts is None or facts.memory.assigned is None else facts.memory.assigned / GIB,
        hbm_usable_gib=search.usable / GIB,
        hbm_is_least=chosen.hbm_is_least,
        remat=chosen.setting.remat,
        microbatches=chosen.setting.microbatches,
        mesh=facts.mesh if facts is not None else _mesh(chosen, search.num_chips),
        flags=chosen.flag_set.name,
        compiler_options=chosen.compiler_options,
        gradient_sum_dtype=applied.train.gradient_sum_dtype or applied.train.compute_dtype,
        attention=None if facts is None else facts.attention,
        price=_price(tpu_slice, pricing),
        trials=tuple(map(_summary, search.trials)),
        advice=tuple(advice(search, chosen, remedies)),
        notes=(*search.notes, *_caveats(tpu_slice, job.train.slice_count), *_of_largest(job)),
        **({} if facts is None else _figures(job, tpu_slice, facts, pricing)),
    )


def _figures(job: Job, tpu_slice: Slice, facts: CompileFacts, pricing: PricingModel) -> dict[str, Any]:
    """The fields that only a compiled step can fill in."""
    bounds = facts.roofline
    hours = bounds.step_seconds * job.hours_per_step_second
    names = (
        "model_flops_per_chip", "executed_flops_per_chip", "recomputation", "hbm_bytes_per_chip", "ici_bytes_per_chip",
        "dcn_bytes_per_chip", "all_gather_async_share", "bound", "compute_seconds", "hbm_seconds", "on_chip_seconds", "ici_seconds",
        "exposed_ici_seconds", "dcn_seconds", "mfu_bound_hidden", "mfu_bound_exposed", "mfu_bound_exposed_by_colors", "step_seconds",
        "tokens_per_second_per_chip",
    )  # fmt: skip
    square = train_flops_per_token(job.model, job.seq_len, full_attention=True) / train_flops_per_token(job.model, job.seq_len)
    return {name: getattr(bounds, name) for name in names} | {
        "ici_async_share": bounds.async_share,
        "collectives": facts.collectives,
        "logits_arrays": facts.logits_arrays,
        "mfu_bound_exposed_full_attention": bounds.mfu_bound_exposed * square,
        "hours": hours,
        "dollars": cost(tpu_slice, job.train.slice_count, hours, pricing).dollars,
        "compile_cpu_seconds": facts.compile_cpu_seconds,
        "lower_cpu_seconds": facts.lower_cpu_seconds,
        "process_cpu_seconds": facts.process_cpu_seconds,
        "peak_rss_gib": facts.peak_rss_bytes / GIB,
    }


def _mesh(trial: Trial, num_chips: int) -> dict[str, int]:
    setting = trial.setting
    fsdp = num_chips // (setting.data * setting.context * setting.tensor)
    return {"data": setting.data, "fsdp": fsdp, "context": setting.context, "tensor": setting.tensor}


def _caveats(tpu_slice: Slice, num_slices: int) -> tuple[str, ...]:
    if num_slices == 1 or not any(tpu_slice.wrap):
        return ()
    return (
        f"ahead of time libtpu compiles for several slices as if {tpu_slice.name} had no wrap-around links: FLOPs, HBM and ICI traffic are "
        "those of one slice with its share of the batch, compiled too; HBM needed and DCN traffic those of all slices",
    )


def _of_largest(job: Job) -> tuple[str, ...]:
    """Where the batch changes, which one is meant."""
    if isinstance(job.train.train_batch_size, int):
        return ()
    return (
        f"train.train_batch_size is {job.train.batch_schedule}: a step is one of {job.batch_size} sequences; hours and dollars count "
        f"the {job.train.num_train_rows:,} sequences of all {job.train.num_train_steps:,} steps",
    )


def _price(tpu_slice: Slice, pricing: PricingModel) -> dict[str, str | float]:
    asked = cost(tpu_slice, 1, 0.0, pricing)
    return {
        "dollars_per_chip_hour": asked.dollars_per_chip_hour,
        "pricing": pricing,
        "region": PRICES[tpu_slice.generation].region,
        "as_of": asked.as_of.isoformat(),
        "source": f"{PRICING_PAGE}; {asked.source}",
    }


def _summary(trial: Trial) -> TrialSummary:
    facts, failure = trial.outcome.facts, trial.outcome.failure
    return TrialSummary(
        remat=trial.setting.remat,
        microbatches=trial.setting.microbatches,
        context=trial.setting.context,
        tensor=trial.setting.tensor,
        flags=trial.flag_set.name,
        hbm_gib_per_chip=None if trial.hbm_bytes is None else trial.hbm_bytes / GIB,
        step_seconds=None if facts is None else facts.roofline.step_seconds,
        failure=None if failure is None else failure.message,
        from_cache=trial.from_cache,
    )
