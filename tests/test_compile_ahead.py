"""What is compiled while a run waits for its slice: whether it fits is said, and nothing of it outlives the waiting."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from model.config import LlamaConfig
from model.flops import CHIPS
from model.preflight import cache
from model.preflight.compiler import Compiled
from model.preflight.evaluation import evaluation_fit
from model.preflight.facts import CompileFailure, CompileOrder, CompileOutcome, Memory
from model.preflight.search import CompilerRefused
from model.preflight.settings import Job
from model.train_config import SimpleTrainConfig
from tasks.compile_ahead import CompileAhead

MODEL = LlamaConfig(seq_len=256, hidden_dim=128, intermediate_dim=256, num_heads=2, num_kv_heads=1, num_layers=1, vocab_size=512)
TRAIN = SimpleTrainConfig(
    train_batch_size=16, num_train_steps=10, learning_rate=1e-3, accelerator_type="v4-8", per_device_parallelism=2
)  # fmt: skip
USABLE = CHIPS["v4"].usable_hbm_bytes


def on_slice(**changes: object) -> Job:
    return Job(name="small", model=MODEL, train=SimpleTrainConfig(**{**dict(TRAIN), **changes}))  # pyright: ignore[reportArgumentType]


def fit_of(job: Job, outcome: CompileOutcome) -> tuple[str, CompileOrder]:
    asked: list[CompileOrder] = []

    def compiled(_: str, order: CompileOrder) -> Compiled:
        asked.append(order)
        return Compiled(outcome, from_cache=False)

    return str(evaluation_fit(job, compiled)), asked[0]


def evaluation_of(total: int) -> CompileOutcome:
    return CompileOutcome(evaluation=Memory(arguments=total - 2, temporaries=1, code=1, assigned=1))


def test_it_fits_to_the_byte() -> None:
    said, order = fit_of(on_slice(), evaluation_of(USABLE))
    assert said.startswith("the evaluation of small on v4-8, 2 sequence(s) a chip, fits: 30.75 of 30.75 GiB")
    assert (order.program, order.compiler_options, order.train.per_device_parallelism) == ("evaluation", {}, 2)
    said, _ = fit_of(on_slice(), evaluation_of(USABLE + 1))
    assert "does NOT fit" in said


def test_what_does_not_fit_names_the_field() -> None:
    job = on_slice(per_device_eval_parallelism=64)
    too_large = CompileOutcome(failure=CompileFailure(kind="out_of_memory", message="hbm", hbm_bytes=100 * 2**30))
    said, _ = fit_of(job, too_large)
    assert "64 sequence(s) a chip, does NOT fit: it needs 100.00 of 30.75 GiB" in said
    assert said.endswith("set train.per_device_eval_parallelism=32")
    said, _ = fit_of(on_slice(per_device_eval_parallelism=1), too_large)
    assert said.endswith("use a larger slice")


def test_what_is_no_matter_of_memory_is_an_error() -> None:
    with pytest.raises(ValueError, match="not so"):
        fit_of(on_slice(), CompileOutcome(failure=CompileFailure(kind="invalid", message="not so")))
    with pytest.raises(CompilerRefused, match="the evaluation: an option"):
        fit_of(on_slice(), CompileOutcome(failure=CompileFailure(kind="refused", message="an option")))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))


def keep(job: Job, outcome: CompileOutcome) -> None:
    """Puts the outcome on disk, where the command looks before it compiles."""
    evaluation_fit(job, lambda _, order: (cache.store(order, outcome), Compiled(outcome, from_cache=True))[1])


def told(job: Job, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """The last line about the job's evaluation."""
    caplog.set_level(logging.INFO)
    with CompileAhead(job.name, job.model, job.train, logging.getLogger("ahead")) as ahead:
        began = time.monotonic()
        while len(caplog.records) < 2 and time.monotonic() - began < 100:
            ahead.look()
            time.sleep(0.05)
    ahead.look()
    assert len(caplog.records) == 2
    assert caplog.records[0].getMessage() == "compiling the evaluation of small for v4-8 while the run waits for its slice"
    return caplog.records[1]


@pytest.mark.usefixtures("own_cache")
def test_a_warning_comes_early(caplog: pytest.LogCaptureFixture) -> None:
    job = on_slice(per_device_eval_parallelism=64)
    keep(job, evaluation_of(2 * USABLE))
    record = told(job, caplog)
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("and the run would end at its first one: set train.per_device_eval_parallelism=32")


@pytest.mark.usefixtures("own_cache")
def test_what_cannot_be_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    record = told(on_slice(train_batch_size=15), caplog)
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("whether the evaluation fits is not known: error: train.train_batch_size=15 does not divide")


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_it_is_compiled_for_the_slice(caplog: pytest.LogCaptureFixture) -> None:
    record = told(on_slice(), caplog)
    assert record.levelno == logging.INFO
    assert "of 30.75 GiB" in record.getMessage()


@pytest.mark.usefixtures("own_cache")
def test_the_child_ends_with_the_waiting() -> None:
    job = on_slice()
    with CompileAhead(job.name, job.model, job.train, logging.getLogger("ahead")) as ahead:
        process = ahead._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
    assert not ahead._output.parent.exists()
