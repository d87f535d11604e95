"""The search over settings, with a compiler that is a function."""

from __future__ import annotations

import pytest

from model.preflight.compiler import Compiled
from model.preflight.compiler_flags import ASYNC_ALL_GATHER, NONE, REDUCE_SCATTER_MATMUL, WHOLE_PRODUCTS, flag_choice
from model.preflight.facts import CompileOrder
from model.preflight.report import choice_rows
from model.preflight.result import result_of
from model.preflight.search import MOST_COMPILES, CompilerRefused, Search
from model.preflight.settings import Fixed, Job, Setting, replace_train, settings_of, single_setting
from model.presets import JOBS
from model.slices import SLICES, slice_named
from tests.preflight_facts import compiled_as_estimated, good, invalid, out_of_memory, refused, setting_of

FLAGS = (NONE, ASYNC_ALL_GATHER, REDUCE_SCATTER_MATMUL, WHOLE_PRODUCTS)


def job(name: str = "dclm-1b", /, **train: object) -> Job:
    return replace_train(Job(name=name, model=JOBS[name].model, train=JOBS[name].train), **train)


class Compiler:
    """Agrees with the estimate, times `memory`; knows what it was asked."""

    def __init__(self, *, memory: float = 1.0, refuses: tuple[str, ...] = (), exposed: dict[str, float] | None = None) -> None:
        self.memory, self.refuses, self.exposed = memory, refuses, exposed or {}
        self.asked: list[tuple[Setting, str]] = []

    def __call__(self, what: str, order: CompileOrder) -> Compiled:
        flags = next(one.name for one in FLAGS if one.options == order.compiler_options)
        self.asked.append((setting_of(order), flags))
        if flags in self.refuses:
            return refused(f"no such option, says the test about {flags}")
        return good(compiled_as_estimated(order, memory=self.memory, exposed=self.exposed.get(flags, 0.0)))


def search(wanted: Job, slice_name: str, compiler: Compiler) -> Search:
    return Search(wanted, slice_named(slice_name), compiler)


def test_least_recomputation_that_fits_and_the_faster_options_in_few_compilations() -> None:
    compiler = Compiler(exposed={"async-all-gather": 0.02})
    found = search(job(), "v4-128", compiler).run(Fixed())
    assert found is not None
    assert (found.setting.remat, found.setting.microbatches, found.flag_set.name) == ("save_all", 1, "reduce-scatter-matmul")
    assert len(compiler.asked) == 2
    slower = Compiler(exposed={"reduce-scatter-matmul": 0.02})
    best = search(job(), "v4-128", slower).run(Fixed())
    assert best is not None
    assert best.flag_set.name == "async-all-gather"


def test_bounds_as_good_as_equal_are_decided_by_memory() -> None:
    class Tight(Compiler):
        def __call__(self, what: str, order: CompileOrder) -> Compiled:
            self.memory = 1.0 if "xla_tpu_reduce_scatter_collective_matmul_mode" in order.compiler_options else 0.9
            return super().__call__(what, order)

    best = search(job(), "v4-128", Tight(exposed={"async-all-gather": 0.003})).run(Fixed())
    assert best is not None
    assert best.flag_set.name == "async-all-gather"
    slower = search(job(), "v4-128", Tight(exposed={"async-all-gather": 0.02})).run(Fixed())  # some 5 percent are not equal
    assert slower is not None
    assert slower.flag_set.name == "reduce-scatter-matmul"


def test_what_a_compilation_needs_corrects_the_estimate() -> None:
    compiler = Compiler(memory=2.5)
    done = search(job(), "v4-128", compiler)
    best = done.run(Fixed())
    assert best is not None
    assert done.fits(best)
    assert not done.fits(done.trials[0])
    last = done.trials[-1]
    assert last.estimate.corrected_bytes(done.correction) == pytest.approx(last.hbm_bytes)
    assert len(compiler.asked) <= 4


def test_refused_options_fall_back_and_are_named() -> None:
    done = search(job(), "v4-128", Compiler(refuses=("reduce-scatter-matmul",)))
    best = done.run(Fixed())
    assert best is not None
    assert best.flag_set.name == "async-all-gather"
    assert len(done.notes) == 1
    assert "refuses its options reduce-scatter-matmul" in done.notes[0]
    assert "says the test about" in done.notes[0]


def test_a_step_refused_with_any_options_is_an_error() -> None:
    names = tuple(one.name for one in FLAGS)
    with pytest.raises(CompilerRefused, match="the TPU compiler refuses this step"):
        search(job(), "v4-128", Compiler(refuses=names)).run(Fixed())


def test_a_setting_that_the_compiler_refuses_is_not_the_end() -> None:
    def compiler(what: str, order: CompileOrder) -> Compiled:
        return refused("says the test") if order.model.remat == "save_all" else good(compiled_as_estimated(order))

    done = Search(job(), slice_named("v4-128"), compiler)
    best = done.run(Fixed())
    assert best is not None
    assert best.setting.remat != "save_all"
    assert any("save_all" in note and "says the test" in note for note in done.notes)


def test_a_finer_split_is_tried_where_the_compiler_refuses_the_coarser() -> None:
    def compiler(what: str, order: CompileOrder) -> Compiled:
        return refused("says the test") if order.train.context_parallel_size == 1 else good(compiled_as_estimated(order))

    best = Search(job(), slice_named("v4-128"), compiler).run(Fixed("full", 1))
    assert best is not None
    assert (best.setting.context, best.setting.tensor) == (2, 1)


def test_a_mesh_that_the_step_does_not_take_is_not_the_end() -> None:
    asked: list[int] = []

    def compiler(what: str, order: CompileOrder) -> Compiled:
        asked.append(order.train.context_parallel_size)
        return invalid("two are too few") if asked[-1] == 2 else good(compiled_as_estimated(order))

    done = Search(job(), slice_named("v4-1024"), compiler)
    best = done.run(Fixed())
    assert best is not None
    assert best.setting.context == 4
    assert asked.count(2) == 1
    assert any("context 2: no such step: two are too few" in note for note in done.notes)


def test_a_job_whose_every_setting_is_invalid_is_refused_as_such() -> None:
    done = Search(job(), slice_named("v4-128"), lambda what, order: invalid(f"not {setting_of(order)}"))
    with pytest.raises(ValueError, match=r"not remat \w+, 1 microbatch$") as raised:  # of the plainest mesh
        done.run(Fixed())
    assert not isinstance(raised.value, CompilerRefused)
    meshes = [(trial.setting.context, trial.setting.tensor) for trial in done.trials]
    assert len(meshes) == len(set(meshes))


def test_the_jobs_own_compiler_options_win_and_are_reported() -> None:
    own = {"xla_tpu_enable_async_collective_fusion": "false", "xla_tpu_of_the_job": "1"}
    asked: list[dict[str, str]] = []

    def compiler(what: str, order: CompileOrder) -> Compiled:
        asked.append(order.compiler_options)
        return good(compiled_as_estimated(order))

    done = Search(job(compiler_options=own), slice_named("v4-128"), compiler)
    best = done.run(Fixed())
    assert best is not None
    assert all(options.items() >= own.items() for options in asked)
    assert best.compiler_options == best.flag_set.options | own
    found = result_of(done, "on_demand")
    assert found.compiler_options == best.compiler_options
    assert "xla_tpu_enable_async_collective_fusion=false" in dict(choice_rows(found))["compiler options"]


def test_a_compiler_option_of_the_job_that_is_none_is_refused_at_once() -> None:
    done = Search(
        job(compiler_options={"xla_no_such": "1"}), slice_named("v4-128"), lambda what, order: refused("No such option xla_no_such")
    )
    with pytest.raises(ValueError, match=r"train.compiler_options=.*No such option xla_no_such"):
        done.run(Fixed())
    assert len(done.trials) == 1


def test_what_is_fixed_stays_and_may_then_not_fit() -> None:
    compiler = Compiler()
    done = search(job("dclm-7b"), "v4-128", compiler)
    assert done.run(Fixed(remat="save_all", microbatches=1)) is None
    assert {(setting.remat, setting.microbatches) for setting, _ in compiler.asked} == {("save_all", 1)}
    assert len(compiler.asked) == 1


def test_out_of_memory_at_compilation_is_a_job_that_does_not_fit() -> None:
    done = Search(job("dclm-7b"), slice_named("v4-128"), lambda what, order: out_of_memory(order, memory=50.0))
    assert done.run(Fixed()) is None
    assert 1 <= len(done.trials) <= MOST_COMPILES
    least = min(trial.hbm_bytes or 0 for trial in done.trials)
    assert done.trials[-1].hbm_bytes == least > done.usable


def test_a_large_job_takes_microbatches_rather_than_recomputation() -> None:
    best = search(job("dclm-7b"), "v4-128", Compiler()).run(Fixed())
    assert best is not None
    assert best.setting.remat == "save_all"
    assert best.setting.microbatches == 16


def test_a_single_setting_is_compiled_once() -> None:
    compiler = Compiler()
    wanted = job()
    best = search(wanted, "v4-128", compiler).single(single_setting(wanted, Fixed()))
    assert best is not None
    assert compiler.asked == [(Setting("full", 1, 1, 1, 1), "reduce-scatter-matmul")]


@pytest.mark.parametrize("slice_name", ["v4-128", "v5p-128", "v5e-256", "v6e-256"])
def test_the_7b_job_fits_every_generation(slice_name: str) -> None:
    best = search(job("dclm-7b"), slice_name, Compiler()).run(Fixed())
    assert best is not None


def test_more_chips_than_sequences_split_the_sequence() -> None:
    best = search(job(), "v4-1024", Compiler()).run(Fixed())
    assert best is not None
    assert (best.setting.context, best.setting.tensor) == (2, 1)
    settings = settings_of(job(), SLICES["v4-1024"], Fixed())
    assert min(setting.context * setting.tensor for setting in settings) == 2


def test_sequences_too_short_to_split_split_the_heads() -> None:
    wanted = job(train_seq_len=256)
    settings = settings_of(wanted, SLICES["v4-1024"], Fixed())
    assert {(setting.context, setting.tensor) for setting in settings} >= {(1, 2)}
    assert all(setting.context == 1 for setting in settings)


@pytest.mark.parametrize(("seq_len", "contexts"), [(1152, {1}), (1024, {1, 2, 4}), (768, {1}), (512, {1, 2}), (2000, {1, 2, 4})])
def test_pieces_of_a_sequence_are_what_the_attention_kernel_takes(seq_len: int, contexts: set[int]) -> None:
    settings = settings_of(job(train_batch_size=4, train_seq_len=seq_len), SLICES["v4-8"], Fixed())
    assert {setting.context for setting in settings} == contexts
    assert {(one.context, one.tensor) for one in settings} >= {(1, size) for size in (2, 4) if size not in contexts}


def test_a_single_sequence_that_cannot_be_split_splits_the_heads() -> None:
    best = search(job(train_batch_size=1, train_seq_len=1152), "v4-8", Compiler()).run(Fixed())
    assert best is not None
    assert (best.setting.context, best.setting.tensor) == (1, 4)


def test_a_sequence_too_long_for_a_chip_is_split_over_several() -> None:
    wanted = job("dclm-7b", train_batch_size=64, train_seq_len=131_072)
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"seq_len": 131_072})})
    best = search(wanted, "v4-128", Compiler()).run(Fixed())
    assert best is not None
    assert best.setting.context > 1


def test_slices_are_replicas() -> None:
    best = search(job("dclm-7b", slice_count=4), "v4-128", Compiler()).run(Fixed())
    assert best is not None
    assert best.setting.data == 4


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"train_batch_size": 255}, r"train_batch_size=255 does not divide over 64 devices .*use a multiple of 64, such as 192"),
        ({"context_parallel_size": 3}, r"context_parallel_size=3 .*does not divide the 64 device"),
        ({"tensor_parallel_size": 32}, r"num_heads=16 is not a multiple of the mesh axis tensor=32"),
        ({"data_parallel_size": 3, "slice_count": 2}, r"data_parallel_size=3 is not a multiple of train.slice_count=2"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(train: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(job(**train), SLICES["v4-128"], Fixed())


def test_microbatches_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"--microbatches=3 does not divide the 4 sequences of each device: use one of 1, 2, 4"):
        settings_of(job(), SLICES["v4-128"], Fixed(microbatches=3))


@pytest.mark.parametrize("microbatches", [0, -1])
def test_no_microbatches(microbatches: int) -> None:
    with pytest.raises(ValueError, match=rf"--microbatches={microbatches}: the batch is computed in 1 part or more"):
        Fixed.of(job(), 64, microbatches=microbatches)


def test_a_single_setting_that_does_not_divide_is_refused_before_it_is_compiled() -> None:
    wanted = job(context_parallel_size=16)
    with pytest.raises(ValueError, match=r"context_parallel_size=16 .*does not divide the 4 device"):
        search(wanted, "v4-8", Compiler()).single(single_setting(wanted, Fixed()))


def test_what_the_configuration_names_is_fixed_and_its_defaults_are_not() -> None:
    open_job = job()
    assert Fixed.of(open_job, 64) == Fixed(None, None)
    named = open_job.model_copy(update={"model": open_job.model.model_copy(update={"gradient_checkpointing": "save_attn"})})
    assert Fixed.of(replace_train(named, per_device_parallelism=1), 64) == Fixed("save_attn", 4)
    off = open_job.model_copy(update={"model": open_job.model.model_copy(update={"gradient_checkpointing": False})})
    assert Fixed.of(off, 64).remat == "none"
    assert Fixed.of(named, 64, remat="full", microbatches=2) == Fixed("full", 2)


def test_a_setting_is_the_configuration_that_training_runs_with() -> None:
    applied = Setting("save_attn", 2, 1, 2, 1).applied(job(), 64)
    assert applied.model.remat == "save_attn"
    assert (applied.train.context_parallel_size, applied.train.per_device_parallelism) == (2, 4)


@pytest.mark.parametrize(
    ("generation", "mebibytes", "scatters"), [("v4", 500, True), ("v5p", 500, True), ("v6e", 32, True), ("v6e", 360, False)]
)
def test_blocks_that_read_from_hbm_are_not_tried_on_long_rings(generation: str, mebibytes: int, scatters: bool) -> None:
    choice = flag_choice(generation, mebibytes * 2**20)  # type: ignore[arg-type]
    assert (REDUCE_SCATTER_MATMUL in choice.compared) == scatters
    assert choice.fallbacks[-1] == NONE
