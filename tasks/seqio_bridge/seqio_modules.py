"""Imports the modules of other people that add tasks to SeqIO's registry."""

from __future__ import annotations

import importlib
import traceback

from tasks.sources import DataError


def import_module(module: str | None) -> None:
    """Imports the module that adds tasks to the registry. Raises DataError where it is not there, or fails, with file and line."""
    if module is None:
        return
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"seqio_module={module!r} cannot be imported ({error}); install it or correct the name") from None
    except (Exception, SystemExit) as error:  # a module runs what it likes
        what = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:400]
        raise DataError(f"seqio_module={module!r} fails when it is imported, at {_place(error)}: {what}; correct the module") from None


def _place(error: BaseException) -> str:
    """File and line of an error in a module that was imported; where that called something else which failed, of that too."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    machinery = (importlib.__file__, __file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and frame.filename not in machinery
    ]
    places = list(dict.fromkeys(f"{frame.filename}:{frame.lineno}" for frame in (*frames[:1], *frames[-1:])))
    return " (raised at ".join(places) + ")" * (len(places) - 1) if places else "a place that is not known"
