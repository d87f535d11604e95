"""Flags of a command line into a dataclass; what is wrong with them is said in a few lines, with the remedy.

    options = parse_flags(Arguments, arguments, prog="train.py")

Tyro draws a box around a mistake, of ten lines and more where pydantic explains it. Its hook for mistakes is not part of its public
interface: without it, or with events that it does not know today, the box is what is seen.
"""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError
from tyro import _errors as tyro_errors

from model.config_base import nearest

T = TypeVar("T")

_BOUNDS = {
    "greater_than_equal": ("ge", "a number of at least {}"),
    "greater_than": ("gt", "a number above {}"),
    "less_than_equal": ("le", "a number of at most {}"),
    "less_than": ("lt", "a number below {}"),
    "multiple_of": ("multiple_of", "a multiple of {}"),
    "string_pattern_mismatch": ("pattern", "what matches {}"),
}
# What other trainers call the same: what a hand types by habit, and no likeness of letters finds.
_BY_HABIT = {
    "lr": "learning-rate",
    "steps": "num-train-steps",
    "max-steps": "num-train-steps",
    "batch-size": "train-batch-size",
    "bs": "train-batch-size",
    "wd": "weight-decay",
    "warmup-steps": "warmup",
    "context-length": "seq-len",
    "grad-clip": "max-grad-norm",
    "output-dir": "root",
    "prefix": "root",
    "dry-run": "plan",
    "run-only": "only",
}


class MistakenFlags(ValueError):
    """The command line cannot be what was meant; the text says why, and what to give instead."""


def parse_flags(form: type[T], arguments: list[str], *, default: T | None = None, **options: Any) -> T:
    """`tyro.cli`, with mistakes as one short message.

    Raises:
        MistakenFlags: an unknown flag, a value of the wrong type or out of bounds, a flag that is missing.
        SystemExit: help was asked for.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        message = _message(event, sys.exc_info()[1], default)
        if message is not None:
            raise MistakenFlags(message) from None

    with tyro_errors.on_parse_error(refuse):
        return tyro.cli(form, args=arguments, **({} if default is None else {"default": default}), **options)


def explain(problem: Any, within: str = "") -> str:
    """One of pydantic's error details as `field=value: what to give`; messages of our own as they are.

    Args:
        problem: an entry of `ValidationError.errors()`.
        within: the path of the configuration that was refused, such as `train`.
    """
    if problem["type"] == "value_error":  # names its fields itself
        return problem["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in (*filter(None, [within]), *problem["loc"]))
    bound, remedy = _BOUNDS.get(problem["type"], ("", ""))
    given = "" if isinstance(problem["input"], dict | BaseModel) else f"={problem['input']!r}"
    said = f"give {remedy.format(problem['ctx'][bound])}" if bound else problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}{given}: {said}"


def _message(event: tyro_errors.ParseErrorEvent, error: BaseException | None, default: Any) -> str | None:
    help_line = f"\n`{event.prog} --help` lists all flags"
    match event:
        case tyro_errors.UnrecognizedArgs():
            return "\n".join(_unknown(token, known_flags(default)) for token in _names(event.tokens)) + help_line
        case tyro_errors.InvalidChoice():
            choices = list(event.choices)
            return f"{_name(event.argument)}: {event.value!r} is unknown{nearest(event.value, choices)}: use one of {', '.join(choices)}"
        case tyro_errors.BadValue():
            return f"{_name(event.argument)} lacks its value: {_meaning(event.argument)}"
        case tyro_errors.MissingArgs():
            lacking = "; ".join(f"{_name(argument.arg)}: {_meaning(argument.arg)}" for argument in event.missing_arguments)
            unknown = [_unknown(token, known_flags(default)) for token in _names(event.unrecognized_tokens)]
            return "\n".join([f"missing {lacking}", *unknown]) + help_line
        case tyro_errors.InstantiationFailure():
            return _refused_value(event, error)
    return None


def _refused_value(event: tyro_errors.InstantiationFailure, error: BaseException | None) -> str:
    if event.argument is not None:
        number = re.search(r"^(?:invalid literal for (int)|could not convert string to float).*?: ('.*')$", event.message)
        message = f"{number[2]} is no {'whole ' * (number[1] is not None)}number" if number else event.message
        return f"{_name(event.argument)}: {message}\n  {_meaning(event.argument)}"
    refused = error if isinstance(error, ValidationError) else error.__context__ if error is not None else None
    if not isinstance(refused, ValidationError):
        return event.message
    place = getattr(error, "arg", "")
    within = str(place).removeprefix("config").removeprefix(".") if isinstance(place, str) else ""
    return "\n".join(explain(problem, within) for problem in refused.errors(include_url=False))


def _names(tokens: list[str]) -> list[str]:
    """The tokens that are meant as flags; those after them are their values."""
    return [token.partition("=")[0] for token in tokens if token.startswith("-")] or tokens


def _unknown(token: str, known: list[str]) -> str:
    if not token.startswith("-"):
        return f"{token!r} stands where no value is expected: give its flag before it, or leave it out"
    last = token.lstrip("-").rpartition(".")[2].replace("_", "-")
    last = _BY_HABIT.get(last, last)
    ends = {flag: flag.lstrip("-").rpartition(".")[2] for flag in known}
    close = (
        [flag for flag, end in ends.items() if end == last]  # the right name, but not where it belongs
        or difflib.get_close_matches(token, known, n=1, cutoff=0.75)
        or [flag for flag, end in ends.items() if last in end]
    )
    meant = f": did you mean {' or '.join(close[:3])}?" if close else ""
    return f"{token} is no flag{meant}"


def known_flags(default: Any) -> list[str]:
    """The flags of a dataclass whose `config` and other configurations have flags of their own, by their paths."""
    return [f"--{path.replace('_', '-')}" for path in _paths(default, "")]


def _paths(value: Any, prefix: str) -> list[str]:
    found: list[str] = []
    fields = type(value).model_fields if isinstance(value, BaseModel) else getattr(value, "__dataclass_fields__", {})
    for name in fields:
        path = prefix if name == "config" and not prefix else f"{prefix}{name}"
        inner = _paths(getattr(value, name), f"{path}." if path else "")
        found += inner or [path]
    return found


def _name(argument: Any) -> str:
    return argument.display_name()


def _meaning(argument: Any) -> str:
    text = argument.field.helptext
    return " ".join(str((text() if callable(text) else text) or "see --help").split())
