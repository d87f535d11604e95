"""Mistakes in an experiment's file, told as those on the command line are: where in the file, which field, what to give.

Errors that explain themselves, raised by the project below a line of the file, need no traceback. All others keep theirs: they are
bugs, of the file or of the project.
"""

from __future__ import annotations

import linecache
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pydantic

from model.child import CHECKOUT
from model.config_base import Config

_OURS = tuple(str(CHECKOUT / package) for package in ("flows", "tasks", "model", "deployments"))
_EXPERIMENTS = str(CHECKOUT / "flows" / "experiments")
_PYDANTIC = str(Path(pydantic.__file__).parent)
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_SECTIONS = {"LlamaConfig": "model", "SimpleTrainConfig": "train", "Mixture": "data"}
_LINES = 6  # of a message


def explain_declarations() -> None:
    """From now on mistakes of the script that runs are explained, where they end it."""
    before = sys.excepthook
    if getattr(before, "explains_declarations", False):
        return

    def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if (lines := mistake(error, trace)) is None:
            before(kind, error, trace)
            return
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(2)  # as for a mistake on the command line

    _hook.explains_declarations = True  # type: ignore[attr-defined]
    sys.excepthook = _hook


def mistake(error: BaseException, trace: TracebackType | None) -> list[str] | None:
    """The lines that tell of a mistake in a script; None where the error is no such, or does not explain itself."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)]
    calls = [(file, line) for file, line in frames if not _is_ours(file) and not file.startswith(_LIBRARIES) and Path(file).is_file()]
    if not calls or frames[-1] == calls[-1] or not _explains_itself(error, *frames[-1]):
        return None
    from flows.command_line import explained

    file, line = calls[-1]
    assert isinstance(error, ValueError | OSError)
    texts = explained(error, _SECTIONS.get(error.title, "") if isinstance(error, pydantic.ValidationError) else "")
    lines = [part for text in texts for part in f"error: {Path(file).name}:{line}: {text}".splitlines()]
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"and {len(lines) - _LINES + 1} more lines"]


def _is_ours(file: str) -> bool:
    return file.startswith(_OURS) and not file.startswith(_EXPERIMENTS)


def _explains_itself(error: BaseException, file: str, line: int) -> bool:
    """Whether the project refused something: a field of its configuration, or by a `raise` of its own."""
    if isinstance(error, pydantic.ValidationError):
        return file.startswith(_PYDANTIC) and error.title in {config.__name__ for config in _configurations(Config)}
    return isinstance(error, ValueError | OSError) and _is_ours(file) and linecache.getline(file, line).strip().startswith("raise ")


def _configurations(base: type[Config]) -> Iterator[type[Config]]:
    for config in base.__subclasses__():
        yield config
        yield from _configurations(config)
