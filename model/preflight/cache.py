"""Outcomes of compilations, kept on disk: the same order to the same compiler, of the same code, is compiled once.

An entry is one JSON file named by its key; it holds a digest of its content, and whatever does not fit it is a miss.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from platformdirs import user_cache_path
from pydantic import ValidationError

from model.durable import write_json
from model.preflight.facts import CompileOrder, CompileOutcome

CACHE_VARIABLE = "PREFECT_LLAMA_CACHE"
_MODEL = Path(__file__).resolve().parent.parent
_COMPILED_BY = "model.preflight.compile_step"
# Fields that decide neither the shapes nor the arithmetic of a step: they are no part of the key.
_IGNORED_TRAIN_FIELDS = frozenset(
    {
        "num_train_steps", "learning_rate", "warmup", "seed", "data_seed", "accelerator_type", "slice_count",
        "steps_per_eval", "steps_per_task_eval", "max_eval_batches", "steps_per_export", "steps_per_hf_export", "minutes_per_checkpoint",
        "max_checkpoints", "max_rollbacks", "steps_per_log", "steps_per_sample", "sample_prompts", "sample_tokens",
        "watchdog_minutes", "profiler", "profiler_start_step", "profiler_num_steps",
    }
)  # fmt: skip


def cache_directory() -> Path:
    """`$PREFECT_LLAMA_CACHE/preflight`, else below the user's cache directory of this platform."""
    chosen = os.environ.get(CACHE_VARIABLE)
    base = Path(chosen).expanduser() if chosen else user_cache_path("prefect-llama", appauthor=False)
    return base / "preflight"


def cache_key(order: CompileOrder) -> str:
    """Digest of everything that can change the outcome: the order, the compiler's version, the code that shapes the step.

    The environment is no part of it, because `model.preflight.topology.prepare` keeps it from the compiler.
    """
    asked = order.model_dump(mode="json")
    asked["train"] = {name: value for name, value in asked["train"].items() if name not in _IGNORED_TRAIN_FIELDS}
    content = {
        "order": asked,
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu", "optax", "qwix")},
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(order: CompileOrder) -> CompileOutcome | None:
    """The kept outcome of an order; None where there is none, or what is there is damaged."""
    try:
        entry = json.loads(_path(order).read_bytes())
        if entry["digest"] != _digest(entry["outcome"]):
            return None
        return CompileOutcome.model_validate(entry["outcome"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def store(order: CompileOrder, outcome: CompileOutcome) -> None:
    """Keeps an outcome; the entry is there whole or not at all.

    Raises:
        OSError: the cache directory cannot be written.
    """
    content = outcome.model_dump(mode="json")
    path = _path(order)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"digest": _digest(content), "outcome": content})


def _path(order: CompileOrder) -> Path:
    return cache_directory() / f"{cache_key(order)}.json"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


@cache
def code_digest() -> str:
    """sha256 over the sources of the compiling process: its module and all of `model/` that it imports, by any way."""
    seen: dict[str, bytes] = {}
    waiting = [_COMPILED_BY]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is None or name in seen:
            continue
        seen[name] = path.read_bytes()
        waiting += _imported(seen[name])
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(f"{name} {len(seen[name])}\n".encode() + seen[name])
    return digest.hexdigest()


def _source(name: str) -> Path | None:
    place = _MODEL.parent.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _imported(source: bytes) -> list[str]:
    """Names of this package's modules that a source imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "model":
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "model"]
    return names
