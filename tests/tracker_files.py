"""Reads what trackers wrote: W&B's own file, TensorBoard's event files as TensorBoard shows them, trackio's database."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[int, float]]]  # steps and values of a key


def tensorboard_points(directory: Path) -> Points:
    """What TensorBoard shows: a session start at a step takes away what was read before it of that step and later ones.

    That is `_Purge` of tensorboard/backend/event_processing/event_accumulator.py, for files of version 2.
    """
    from tensorboardX.proto import event_pb2

    events: Any = event_pb2
    points: Points = {}
    for path in sorted(directory.glob("events*")):
        for record in _tf_records(path.read_bytes()):
            event = events.Event.FromString(record)
            if event.HasField("session_log") and event.session_log.status == events.SessionLog.START:
                points = {key: [point for point in of if point[0] < event.step] for key, of in points.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points.setdefault(value.tag, []).append((event.step, value.simple_value))
    return points


def _tf_records(data: bytes) -> Iterator[bytes]:
    """Length, its checksum, the record, its checksum; a killed writer leaves a torn last one."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def wandb_rows(directory: Path) -> list[dict[str, Any]]:
    """The history rows of all W&B files below a run's directory, in order of writing; `_step` is W&B's own number."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    rows = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in _leveldb_records(path.read_bytes()):
            message = messages.Record.FromString(record)
            if message.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
                rows.append({"_step": message.history.step.num, **row})
    return rows


def _leveldb_records(data: bytes, block: int = 32 * 1024) -> Iterator[bytes]:
    """LevelDB's log format behind a header of 7 bytes: checksum, length and kind (1 whole, 2 first, 3 middle, 4 last part)."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def trackio_rows(directory: Path, run: str) -> list[dict[str, Any]]:
    """The rows of a run in trackio's database, with their `step`."""
    rows = []
    for path in directory.glob("*.db"):
        with sqlite3.connect(path) as database:
            found = database.execute("select step, metrics from metrics where run_name = ? order by id", (run,)).fetchall()
        rows += [{"step": step, **json.loads(metrics)} for step, metrics in found]
    return rows
