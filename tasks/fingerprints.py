"""Canonical JSON, fingerprints of configurations, digests of files, and differences a person can read."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from model.config_base import Config

_READ_BYTES = 1 << 20


def canonical_value(value: Any, path: str = "value") -> Any:
    """`value` as plain JSON values: tuples become lists, sets sorted lists, a Config its identity.

    Raises TypeError naming `path` for a type that has no stable text, and ValueError for nan and infinity.
    """
    if value is None or (isinstance(value, bool | str | int) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which has no place in a fingerprint: use a finite number")
        return value
    if isinstance(value, enum.Enum):
        return canonical_value(value.value, path)
    if isinstance(value, Config):
        return canonical_value(value.identity(), path)
    if isinstance(value, BaseModel):
        return canonical_value(value.model_dump(mode="json"), path)
    if isinstance(value, Mapping):
        return _canonical_mapping(value, path)
    if isinstance(value, list | tuple):
        return [canonical_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((canonical_value(item, f"{path}{{}}") for item in value), key=_dump)
    raise TypeError(f"{path} is a {type(value).__name__}, which has no canonical JSON: use numbers, text, lists, dicts or a Config")


def _canonical_mapping(mapping: Mapping[Any, Any], path: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in mapping.items():
        if not isinstance(key, str):
            # 1 and "1" would fall together in JSON and two different configurations would share a fingerprint
            raise TypeError(f"{path} has the key {key!r}, a {type(key).__name__}: keys must be text")
        result[str(key)] = canonical_value(item, f"{path}.{key}")
    return result


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def plain_value(value: Any, path: str = "value") -> Any:
    """`value` as JSON values for a record a person reads, not for a fingerprint.

    As `canonical_value`, but NumPy scalars become Python numbers, and nan and infinity become text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_value(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, str | int | float) and callable(item := getattr(value, "item", None)):
        value = item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return canonical_value(value, path)


def canonical_json(value: Any) -> str:
    """One text for equal values, whatever the order of keys, the process or the machine.

    Floats are written by `repr`, the shortest text that reads back exactly. Raises TypeError or ValueError as
    `canonical_value` does.
    """
    return _dump(canonical_value(value))


def fingerprint(value: Any) -> str:
    """The sha256 of `canonical_json(value)`: 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each leaf that differs between two JSON values, such as `train.learning_rate: 0.001 -> 0.002`.

    A key only in `new` reads `name: added 3`, one only in `old` reads `name: removed (was 3)`.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted({*old, *new}) for line in _member(old, new, key, f"{path}.{key}" if path else str(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for index, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{path}[{index}]")]
    if _dump(old) == _dump(new):
        return []
    return [f"{path or 'value'}: {_short(old)} -> {_short(new)}"]


def _member(old: dict[str, Any], new: dict[str, Any], key: str, path: str) -> list[str]:
    if key not in old:
        return [f"{path}: added {_short(new[key])}"]
    if key not in new:
        return [f"{path}: removed (was {_short(old[key])})"]
    return differences(old[key], new[key], path)


def _short(value: Any) -> str:
    text = _dump(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """The digest of a file's bytes, in hexadecimal, read in pieces of 1 MiB.

    Refuses to follow a symbolic link at the last component, so that what is hashed is what was listed (OSError).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    digest = hashlib.new(algorithm)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
