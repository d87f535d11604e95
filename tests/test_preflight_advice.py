"""Advice is computed: what a job needs to fit, and which slice suits it."""

from __future__ import annotations

import re

import pytest

from model.config import LlamaConfig
from model.flops import CHIPS, GIB
from model.preflight.advice import advice
from model.preflight.compiler import Compiled, CompilerCrash
from model.preflight.estimate import estimate
from model.preflight.facts import CompileOrder
from model.preflight.remedies import MOST_TRIES, Remedies, find_remedies
from model.preflight.report import headline
from model.preflight.result import Preflight, result_of
from model.preflight.search import Search
from model.preflight.settings import Fixed, Job, Setting, replace_train
from model.presets import JOBS
from model.slices import SLICES, slice_named
from model.train_config import SimpleTrainConfig
from tests.preflight_facts import compiled_as_estimated, good, out_of_memory, setting_of


def found(
    name: str, slice_name: str, fixed: Fixed, *, memory: float = 1.0, hbm: float = 1.0, exposed: float = 0.0, **train: object
) -> Search:
    job = replace_train(Job(name=name, model=JOBS[name].model, train=JOBS[name].train), **train)
    search = Search(
        job, slice_named(slice_name), lambda _, order: good(compiled_as_estimated(order, memory=memory, hbm=hbm, exposed=exposed))
    )
    search.run(fixed)
    return search


def lines(search: Search, remedies: Remedies | None = None) -> list[str]:
    chosen = search.best or search.trials[-1]
    return list(advice(search, chosen, remedies))


def wide_job(**train: object) -> Job:
    """Two wide layers, of which a chip may have many tokens."""
    model = LlamaConfig(
        seq_len=2048, hidden_dim=2048, intermediate_dim=8192, num_heads=16, num_kv_heads=16, num_layers=2, vocab_size=32_768
    )
    return Job(name="wide", model=model, train=SimpleTrainConfig(num_train_steps=10, learning_rate=1e-3, **train))  # type: ignore[arg-type]


class Compiler:
    """Needs more memory than estimated, but for one setting; counts what it is asked."""

    def __init__(self, as_estimated: Setting, more: float) -> None:
        self.as_estimated, self.more, self.asked = as_estimated, more, 0

    def __call__(self, what: str, order: CompileOrder) -> Compiled:
        self.asked += 1
        return good(compiled_as_estimated(order, memory=1.0 if setting_of(order) == self.as_estimated else self.more))


def test_a_job_that_suits_its_slice_needs_no_advice() -> None:
    assert lines(found("dclm-1b", "v4-128", Fixed())) == []


def test_too_many_chips() -> None:
    first, cheapest, fastest = lines(found("dclm-1b", "v6e-256", Fixed(), hbm=1.2))
    assert "dclm-1b on 256 v6e chips is HBM-bound and ICI-bound: 2,048 tokens a chip give" in first
    assert "FLOP per byte of HBM where v6e needs 560" in first
    advised = re.search(r"use (\d+) \((\S+)\)", first)
    assert advised is not None
    assert SLICES[advised.group(2)].num_chips == int(advised.group(1)) < 256
    assert cheapest.startswith("the cheapest slice that computation bounds, by estimate: ")
    assert fastest.startswith("the fastest slice that computation bounds, by estimate: ")


def test_links_that_bind_are_named() -> None:
    first = lines(found("dclm-1b", "v5e-256", Fixed(), exposed=0.2))[0]
    assert "is ICI-bound: 1.00 GB over ICI take a chip " in first
    assert "(200.0 exposed) beside " in first
    assert "HBM" not in first


def test_where_the_figures_of_several_slices_come_from_is_noted() -> None:
    search = found("dclm-7b", "v4-128", Fixed(), exposed=5.0, slice_count=4)
    assert any("ICI-bound" in line for line in lines(search))
    assert any("ICI traffic are those of one slice" in note for note in result_of(search, "on_demand").notes)
    assert not result_of(found("dclm-7b", "v4-8", Fixed("full"), slice_count=2), "on_demand").notes


def test_settings_and_batches_that_would_fit() -> None:
    search = found("dclm-7b", "v4-128", Fixed(remat="save_qkv_attn", microbatches=2))
    needs, setting, batch, *_ = lines(search)
    assert re.match(r"remat save_qkv_attn, 2 microbatches needs \d+\.\d+ GiB of 30.75 GiB usable HBM per chip of v4-128", needs)
    assert all("by estimate" in line and "may be up to 40% more" in line and "not compiled" in line for line in (setting, batch))
    advised = re.search(r"--remat (\S+) --microbatches (\d+)", setting)
    assert advised is not None
    again = found("dclm-7b", "v4-128", Fixed(advised.group(1), int(advised.group(2))))  # type: ignore[arg-type]
    assert again.best is not None
    sequences = re.search(r"--batch (\d+)", batch)
    assert sequences is not None
    smaller = found("dclm-7b", "v4-128", Fixed("save_qkv_attn", 2), train_batch_size=int(sequences.group(1)))
    assert smaller.best is not None
    larger = search.job.with_batch(int(sequences.group(1)) + 128)
    made = estimate(larger, search.tpu_slice, search.trials[-1].setting)
    assert made.hbm_bytes > 0.92 * search.usable


def test_what_is_said_to_fit_was_compiled_with_few_compilations() -> None:
    fixed = Fixed("save_qkv_attn", 2)
    compiler = Compiler(Setting("save_qkv_attn", 2, 1, 1, 1), more=1.35)
    job = Job(name="dclm-7b", model=JOBS["dclm-7b"].model, train=JOBS["dclm-7b"].train)
    search = Search(job, slice_named("v4-128"), compiler)
    assert search.run(fixed) is None
    before = compiler.asked
    said = lines(search, find_remedies(search, fixed))
    assert 2 <= compiler.asked - before <= 2 * MOST_TRIES
    setting = next(line for line in said if line.startswith("it fits with --remat"))
    batch = next(line for line in said if "a smaller batch fits" in line)
    assert all(line.endswith("GiB, compiled") for line in (setting, batch))
    advised = re.search(r"--remat (\S+) --microbatches (\d+)", setting)
    sequences = re.search(r"--batch (\d+)", batch)
    assert advised is not None
    assert sequences is not None
    remat, microbatches = advised.groups()
    assert Search(job, search.tpu_slice, compiler).run(Fixed(remat, int(microbatches))) is not None  # type: ignore[arg-type]
    assert Search(job.with_batch(int(sequences.group(1))), search.tpu_slice, compiler).run(fixed) is not None


def test_nothing_is_said_to_fit_where_no_compilation_does() -> None:
    fixed = Fixed("save_qkv_attn", 2)
    search = found("dclm-7b", "v4-128", fixed, memory=1000.0)
    said = lines(search, find_remedies(search, fixed))
    assert not any("fits" in line for line in said)


def test_a_smaller_batch_is_tried_until_it_fits() -> None:
    asked: list[int] = []

    def compiler(what: str, order: CompileOrder) -> Compiled:
        asked.append(order.train.train_batch_size)
        if asked[-1] == 64:  # as where libtpu gives up before it assigns buffers
            return out_of_memory(order, memory=0.9, temporaries_only=True)
        return good(compiled_as_estimated(order, memory=1.3))

    fixed = Fixed("none", 1)
    search = Search(wide_job(train_batch_size=64), slice_named("v5e-1"), compiler)
    assert search.run(fixed) is None
    remedies = find_remedies(search, Fixed())
    assert remedies.batch is not None
    sequences, trial = remedies.batch
    assert asked[-1] == sequences < asked[-2] < 64
    assert search.fits(trial)
    assert lines(search, remedies)[0].startswith("remat none, 1 microbatch needs at least ")
    assert "at least" in headline(result_of(search, "on_demand", remedies))


def test_a_compiler_that_breaks_over_advice_is_noted() -> None:
    fixed = Fixed("save_qkv_attn", 2)
    search = found("dclm-7b", "v4-128", fixed)

    def broken(what: str, order: CompileOrder) -> Compiled:
        raise CompilerCrash("killed")

    search.compile = broken
    assert find_remedies(search, fixed) == Remedies()
    assert search.notes == ["advice is not complete: killed"]


def test_sequences_are_split_only_where_no_slice_holds_them_whole() -> None:
    search = Search(wide_job(train_batch_size=64), slice_named("v5e-1"), lambda _, order: good(compiled_as_estimated(order)))
    assert search.run(Fixed("none", 1)) is None
    smallest = lines(search)[-1]
    assert "v4-8 (" in smallest
    assert "context" not in smallest
    assert "tensor" not in smallest
    model = JOBS["dclm-7b"].model.model_copy(update={"seq_len": 524_288})
    train = JOBS["dclm-7b"].train.model_copy(update={"train_batch_size": 64})
    long = Search(Job(name="long", model=model, train=train), slice_named("v4-8"), lambda _, order: good(compiled_as_estimated(order)))
    assert long.run(Fixed()) is None
    assert ", context " in lines(long)[-1]


def test_slices_that_would_hold_it() -> None:
    search = found("dclm-7b", "v5e-8", Fixed())
    assert search.best is None
    smallest = lines(search)[-1]
    assert smallest.startswith("the smallest slices that would hold it, by estimate (memory may be up to 40% more): ")
    for name in re.findall(r"(v\S+) \(", smallest):
        held = found("dclm-7b", name, Fixed())
        assert held.best is not None, name


def test_a_job_no_slice_holds() -> None:
    assert "no slice of the catalogue would hold it" in lines(found("dclm-7b", "v4-128", Fixed(), memory=1000.0))[-1]


def test_splits_that_were_chosen_are_said() -> None:
    assert any("each sequence is split over 2 chips" in line for line in lines(found("dclm-1b", "v4-1024", Fixed())))


@pytest.mark.parametrize(("slice_name", "fits"), [("v4-128", True), ("v5e-8", False)])
def test_the_result_has_every_key_that_others_read(slice_name: str, fits: bool) -> None:
    search = found("dclm-7b", slice_name, Fixed())
    result = result_of(search, "on_demand")
    keys = {
        "fits", "hbm_gib_per_chip", "hbm_usable_gib", "executed_flops_per_chip", "model_flops_per_chip", "ici_bytes_per_chip",
        "all_gather_async_share", "mfu_bound_exposed", "mfu_bound_hidden", "compile_cpu_seconds", "remat", "microbatches", "mesh",
        "compiler_options", "step_seconds", "hours", "dollars", "advice",
    }  # fmt: skip
    assert keys <= result.model_dump().keys()
    assert result.fits == fits
    assert result.hbm_usable_gib == CHIPS[search.tpu_slice.generation].usable_hbm_bytes / GIB
    assert Preflight.model_validate_json(result.model_dump_json()) == result


def test_hours_and_dollars() -> None:
    search = found("dclm-1b", "v4-128", Fixed())
    result = result_of(search, "on_demand")
    assert result.step_seconds is not None
    assert result.hours is not None
    assert result.hours == pytest.approx(result.step_seconds * 54_931 / 3600)
    assert result.dollars == pytest.approx(result.hours * 64 * 3.22)
    spot = result_of(search, "spot")
    assert spot.dollars == pytest.approx(result.hours * 64 * 0.9215)
    two = result_of(found("dclm-1b", "v4-128", Fixed(), slice_count=2), "on_demand")
    assert two.hours is not None
    assert two.dollars == pytest.approx(two.hours * 128 * 3.22)
    assert two.num_hosts == 32
