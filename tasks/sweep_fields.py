"""Fields of a run by their dotted names, `train.learning_rate`: found, given values, and changed; what a sweep's flags speak of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from model.config_base import Config, nearest
from tasks.config import RunConfig

_OPENS, _CLOSES = "[{(", "]})"
SECTIONS = ("model", "train", "data", "export")


def field_values(path: str) -> TypeAdapter[Any]:
    """What values of the field `path` of a run must be.

    Raises:
        ValueError: there is no such field, or it does not change what is trained; names the nearest one.
    """
    kind: type[Config] = RunConfig
    parts = path.split(".")
    for index, name in enumerate(parts):
        field = kind.model_fields.get(name)
        if field is None:
            near = nearest(
                path, list(_paths(RunConfig)) if index == 0 else [".".join([*parts[:index], each]) for each in kind.model_fields]
            )
            raise ValueError(f"{path}: {kind.__name__} has no field {name!r}{near}")
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("runtime"):
            raise ValueError(f"{path} does not change what is trained, so all arms would be one: sweep over another field")
        if index == len(parts) - 1:
            return _adapter(field)
        if (value_type := _mapped_to(field.annotation)) is not None and index == len(parts) - 2:
            return TypeAdapter(value_type)
        inner = _config_in(field.annotation)
        if inner is None:
            raise ValueError(f"{path}: {'.'.join(parts[: index + 1])} has no fields of its own: give its name alone")
        kind = inner
    raise AssertionError("unreachable")


def value_of(path: str, text: str) -> Any:
    """The value that `text` stands for in the field `path`, as the command line reads it; `none` where a field can be unset.

    Raises:
        ValueError: no such field, or no such value of it.
    """
    adapter = field_values(path)
    plain = "null" if text.lower() == "none" else text
    try:
        return adapter.validate_json(plain, strict=True)
    except ValidationError:
        try:
            return adapter.validate_strings(text)
        except ValidationError as error:
            raise ValueError(f"{path}={text}: {_said(error)}") from None


def checked_value(path: str, value: Any) -> Any:
    """`value`, as the field `path` has it. Raises ValueError where it is of another type or out of bounds."""
    try:
        return field_values(path).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{path}={value!r}: {_said(error)}") from None


def with_changes(base: RunConfig, name: str, changes: Mapping[str, Any]) -> RunConfig:
    """`base` under another name, with the fields of `changes`, dotted names to values, all changed at once.

    Raises:
        ValueError: the values contradict each other or the rest of the run.
    """
    tree: dict[str, Any] = {"name": name}
    for path, value in changes.items():
        node = tree
        *sections, last = path.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    try:
        return RunConfig(**_merged(base, tree))
    except ValidationError as error:
        what = ", ".join(f"{path}={value}" for path, value in changes.items())
        raise ValueError(f"the arm with {what} cannot run: {_said(error)}") from None


def value_at(config: RunConfig, path: str) -> Any:
    """The value of the field `path`; None for a key that a mapping lacks."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name)
    return value


def split_values(text: str) -> list[str]:
    """`a,b,[c,d]` at the commas that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in _OPENS) - (character in _CLOSES)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def written(value: Any) -> str:
    """A value as a name and a table have it: `0.001`, `adamw`, `none`."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, str | int):
        return str(value)
    return json.dumps(TypeAdapter(type(value)).dump_python(value, mode="json"), separators=(",", ":"))


def in_a_name(text: str) -> str:
    """`text` with what cannot stand in a run's name as `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def _merged(config: Config, tree: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = dict(config)
    for name, change in tree.items():
        before = fields.get(name)
        if isinstance(change, dict) and isinstance(before, Config):
            fields[name] = type(before)(**_merged(before, change))
        elif isinstance(change, dict) and isinstance(before, Mapping):
            fields[name] = {**before, **change}
        else:
            fields[name] = change
    return fields


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    metadata = tuple(field.metadata)
    return TypeAdapter(Annotated[(field.annotation, *metadata)] if metadata else field.annotation)  # type: ignore[valid-type]


def _mapped_to(annotation: Any) -> Any:
    """The type of the values where a field is a mapping from text."""
    for each in (annotation, *get_args(annotation)):
        if get_origin(each) is dict and get_args(each)[0] is str:
            return get_args(each)[1]
    return None


def _config_in(annotation: Any) -> type[Config] | None:
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, Config):
            return each
    return None


def _paths(kind: type[Config]) -> Iterator[str]:
    """Dotted names of the fields of the sections, which a person may have left the section out of."""
    for section in SECTIONS:
        inner = _config_in(kind.model_fields[section].annotation)
        if inner is not None:
            yield from (f"{section}.{name}" for name in inner.model_fields)


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where and where not in message and first["type"] == "value_error" and "." in where else message
