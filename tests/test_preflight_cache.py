"""Compilations kept on disk: what is the same, what is a miss, and that nothing damaged is believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from model import child
from model.preflight import cache, compiler
from model.preflight.compiler import CompilerCrash, compile_order
from model.preflight.facts import CompileOrder, CompileOutcome
from model.preflight.settings import Job, Setting, replace_train
from model.presets import JOBS
from tests.preflight_facts import compiled_as_estimated


def order(**train: object) -> CompileOrder:
    job = Setting("save_all", 1, 1, 1, 1).applied(
        replace_train(Job(name="r1", model=JOBS["dclm-1b"].model, train=JOBS["dclm-1b"].train), **train), 64
    )
    return CompileOrder(model=job.model, train=job.train, slice_name="v4-128", num_slices=1, compiler_options={})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "preflight"


def outcome() -> CompileOutcome:
    return CompileOutcome(facts=compiled_as_estimated(order()))


def test_what_is_stored_comes_back() -> None:
    assert cache.load(order()) is None
    cache.store(order(), outcome())
    assert cache.load(order()) == outcome()


def test_a_cached_order_starts_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(order(), outcome())
    monkeypatch.setattr(compiler, "_in_child", lambda *_: pytest.fail("a child was started"))
    assert compile_order(order()).from_cache
    assert compile_order(order()).outcome == outcome()


def test_an_outcome_is_kept_and_not_used_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "check_compiler", lambda: None)
    monkeypatch.setattr(compiler, "_in_child", lambda *_: outcome())
    assert not compile_order(order()).from_cache
    assert compile_order(order()).from_cache
    assert not compile_order(order(), use_cache=False).from_cache


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"temporaries": 1', '"temporaries": 2', 1),
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({"digest": cache._digest({"facts": {}}), "outcome": {"facts": {}}}),
    ],
    ids=["cut off", "a digit changed", "empty", "another kind", "other fields"],
)
def test_a_damaged_entry_is_a_miss(own_cache: Path, damage: object) -> None:
    cache.store(order(), outcome())
    (entry,) = own_cache.glob("*.json")
    text = entry.read_text()
    damaged = damage(text)  # type: ignore[operator]
    assert damaged != text
    entry.write_text(damaged)
    assert cache.load(order()) is None


def test_the_key_is_what_the_program_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache.cache_key(order())
    assert cache.cache_key(order(learning_rate=1.0, num_train_steps=9, warmup=0.1)) == key
    assert cache.cache_key(order(train_batch_size=512)) != key
    assert cache.cache_key(order(z_loss_weight=0.0)) != key
    assert cache.cache_key(order().model_copy(update={"compiler_options": {"a": "b"}})) != key
    assert cache.cache_key(order().model_copy(update={"num_slices": 2})) != key
    monkeypatch.setattr(cache, "_version", lambda package: "another")
    assert cache.cache_key(order()) != key


def test_the_code_that_shapes_the_step_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = cache.code_digest.__wrapped__()
    copy = tmp_path / "copy" / "model"
    shutil.copytree(cache._MODEL, copy)
    monkeypatch.setattr(cache, "_MODEL", copy)
    assert cache.code_digest.__wrapped__() == digest
    for name in ("llama.py", "losses.py", "train_step.py", "splash_attention.py", "slices.py", "preflight/hlo_memory.py"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b"\n# changed\n")
        assert cache.code_digest.__wrapped__() != digest, name
        (copy / name).write_bytes(before)
    for name in ("trainer.py", "preflight/report.py", "export.py"):
        (copy / name).write_bytes((copy / name).read_bytes() + b"\n# changed\n")
    assert cache.code_digest.__wrapped__() == digest


def test_a_compiler_that_dies_is_an_error_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "model" / "preflight"
    package.mkdir(parents=True)
    for place in (package.parent, package):
        (place / "__init__.py").write_text("")
    (package / "compile_step.py").write_text("import os, sys\nprint('F1234 check failed', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr(compiler, "check_compiler", lambda: None)
    monkeypatch.setattr(child, "CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompilerCrash, match=r"(?s)signal 6.*check failed"):
        compile_order(order())


def test_a_cache_that_cannot_be_written_is_said_and_no_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiler, "check_compiler", lambda: None)
    monkeypatch.setattr(compiler, "_in_child", lambda *_: outcome())
    monkeypatch.setenv(cache.CACHE_VARIABLE, "/proc/nowhere")
    assert compile_order(order()).outcome == outcome()
    assert "cannot be written" in capsys.readouterr().err
