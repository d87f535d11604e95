"""Compilations kept on disk: what is the same, what is a miss, and that nothing damaged is believed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from model import child
from model.preflight import cache, compiler
from model.preflight.compiler import CompilerCrash, compile_order
from model.preflight.facts import CompileFacts, CompileOrder, CompileOutcome
from model.preflight.settings import Job, Setting, replace_train
from model.preflight.workspace import workspace
from model.presets import JOBS
from tests.preflight_facts import compiled_as_estimated, invalid, out_of_memory, refused


def order(**train: object) -> CompileOrder:
    job = Setting("save_all", 1, 1, 1, 1).applied(
        replace_train(Job(name="r1", model=JOBS["dclm-1b"].model, train=JOBS["dclm-1b"].train), **train), 64
    )
    return CompileOrder(model=job.model, train=job.train, slice_name="v4-128", num_slices=1, compiler_options={})


def without_layout(facts: CompileFacts) -> CompileFacts:
    """What a full disk leaves: the compiler's report is missing."""
    return facts.model_copy(update={"memory": facts.memory.model_copy(update={"assigned": None})})


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
    "made",
    [
        refused("No such compile option").outcome,
        invalid("does not divide").outcome,
        CompileOutcome(facts=without_layout(compiled_as_estimated(order()))),
    ],
    ids=["refused", "invalid", "a report that is not there"],
)
def test_what_another_compilation_might_say_otherwise_is_not_kept(made: CompileOutcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "check_compiler", lambda: None)
    monkeypatch.setattr(compiler, "_in_child", lambda *_: made)
    assert compile_order(order()).outcome == made
    assert cache.load(order()) is None
    monkeypatch.setattr(compiler, "_in_child", lambda *_: outcome())
    assert compile_order(order()).outcome == outcome()


def test_want_of_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "check_compiler", lambda: None)
    monkeypatch.setattr(compiler, "_in_child", lambda *_: out_of_memory(order()).outcome)
    assert not compile_order(order()).from_cache
    assert compile_order(order()).from_cache


def test_the_compiler_has_no_environment_of_the_caller() -> None:
    """Everything that a caller may have set for training on its own devices would change what is compiled, or by what."""
    set_by_caller = {"LIBTPU_INIT_ARGS": "--xla_tpu_x=false", "XLA_FLAGS": "--xla_y", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    set_by_caller |= {"JAX_PLATFORMS": "tpu", "JAX_ENABLE_X64": "1", "TPU_LIBRARY_PATH": "/nowhere.so", "MEGASCALE_NUM_SLICES": "2"}
    script = "import json, os; from model.preflight import topology; topology.prepare(); print(json.dumps(dict(os.environ)))"
    pytest.importorskip("libtpu")
    seen = []
    for extra in ({}, set_by_caller):
        clean = {name: value for name, value in child.child_environment().items() if name not in set_by_caller}
        done = subprocess.run([sys.executable, "-c", script], env=clean | extra, capture_output=True, text=True, check=True)
        seen.append(json.loads(done.stdout))
    assert seen[0] == seen[1]
    assert seen[1]["JAX_PLATFORMS"] == "cpu"


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
    assert cache.cache_key(order(learning_rate=1.0, num_train_steps=9, warmup=0.1, profiler=True, watchdog_minutes=1.0)) == key
    assert cache.cache_key(order(train_batch_size=512)) != key
    assert cache.cache_key(order(z_loss_weight=0.0)) != key
    assert cache.cache_key(order().model_copy(update={"compiler_options": {"a": "b"}})) != key
    assert cache.cache_key(order().model_copy(update={"num_slices": 2})) != key
    assert cache.cache_key(order(compiler_options={"a": "b"})) != key
    version = cache._version
    for changed in ("jax", "jaxlib", "libtpu", "optax", "qwix"):
        monkeypatch.setattr(cache, "_version", lambda package, changed=changed: "another" if package == changed else version(package))
        assert cache.cache_key(order()) != key, changed


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


def test_what_killed_compilations_left_is_removed_and_what_lives_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = [tmp_path / f"preflight-compile-{name}" for name in ("killed", "in use", "being made")]
    for directory in left:
        directory.mkdir()
        (directory / "dump").mkdir()
        (directory / "lock").touch()
    long_ago = time.time() - 1000
    for directory in left[:2]:
        os.utime(directory / "lock", (long_ago, long_ago))
    with (left[1] / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with workspace() as own:
            assert sorted(tmp_path.iterdir()) == sorted([own, *left[1:]])
    assert sorted(tmp_path.iterdir()) == sorted(left[1:])


SLOW_COMPILER = """
import pathlib, sys, time
from model.child import die_with_parent
die_with_parent()
dump = pathlib.Path(sys.argv[1]) / "dump"
dump.mkdir()
(dump / "module.txt").write_text("half a report")
print('{"event": "stage", "name": "compile"}', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_preflight_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int) -> None:
    pytest.importorskip("libtpu")
    shutil.copytree(cache._MODEL, tmp_path / "copy" / "model", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "copy" / "model" / "preflight" / "compile_step.py").write_text(SLOW_COMPILER)
    (tmp_path / "temporary").mkdir()
    variables = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(tmp_path / "copy"), "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-m", "model.preflight", "debug", "--accelerator", "v4-8", "--no-search"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=variables,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background may have it ignored
    ) as process:
        assert process.stderr is not None
        assert "compile 1: " in process.stderr.readline()  # the child is at work
        assert list((tmp_path / "temporary").rglob("module.txt"))
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # a terminal signals all of its group
        rest = process.stderr.read()
    assert process.returncode == status
    assert "Traceback" not in rest
    assert not list((tmp_path / "temporary").iterdir())
