"""Small JSON and text files of a run, beside its artifacts, on a disk or in a bucket: each is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.durable import json_text, write_durably
from tasks import objects
from tasks.places import Place
from tasks.storage import make_directory, storage_errors


def read_json(place: Place) -> dict[str, Any] | None:
    """The JSON object at `place`; None where there is no file. Raises ValueError where it is damaged, StorageError."""
    text = read_text(place)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({error}): remove it; the next start of the run writes it anew") from None
    if not isinstance(found, dict):
        raise ValueError(f"{place} is damaged (it is no object): remove it; the next start of the run writes it anew")
    return found


def read_text(place: Place) -> str | None:
    """The text at `place`, whatever cannot be decoded replaced; None where there is no file. Raises StorageError."""
    try:
        data = place.read_bytes() if isinstance(place, Path) else objects.read(place)[0]
    except FileNotFoundError:
        return None
    return data.decode("utf-8", "replace")


def write_json(place: Place, value: dict[str, Any]) -> None:
    """Writes a JSON object. Raises StorageError."""
    write_text(place, json_text(value))


def write_text(place: Place, text: str) -> None:
    """Writes a text file as UTF-8; its directory is made. Raises StorageError."""
    if not isinstance(place, Path):
        objects.write(place, text.encode(), generation=None)
        return
    with storage_errors(place.parent):
        make_directory(place.parent)
        write_durably(place, text.encode())
