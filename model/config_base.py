"""The base of every configuration class: frozen, closed, and clear about what identifies a run.

A field is part of a run's identity unless it is declared with `runtime(...)`. Two configurations
with equal identity fields describe the same result, so the second run reuses the first's.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


def runtime(default: Any = ..., **kwargs: Any) -> Any:
    """Declares a field that may change between attempts without changing the result's identity."""
    return Field(default, json_schema_extra={"runtime": True}, **kwargs)


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown fields and names the nearest known one."""

    # an error's text can reach a log, and a value can be a secret that is being refused
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    raise ValueError(f"{cls.__name__} has no field {key!r}{nearest(str(key), known)}; its fields are {', '.join(known)}")
        return data

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON values, nested configurations included."""
        return {
            name: _identity_value(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("runtime"))
        }


def _identity_value(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _identity_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity_value(item) for item in value]
    return value
