"""Leases as objects of a bucket: one object for each key, replaced only in the generation that was read.

Of all who saw a lease end, exactly one replaces it, and the number it puts into it is the fencing token. The holder shows
that it lives by writing the object again: its generation changes, and is compared, never read as a time. A holder that
was replaced finds another generation, so it can neither renew its lease nor give it back.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import replace

from tasks import objects
from tasks.lease_store import Lease, Owner, dump_lease, lease_name, parse_lease
from tasks.object_requests import PreconditionFailed
from tasks.places import ObjectPath


def lease_object(key: str) -> ObjectPath:
    """Where the lease of `key` lies: in `.leases` beside the artifact's directory."""
    directory, name = lease_name(key)
    assert isinstance(directory, ObjectPath)
    return directory / f"{name}.json"


def newest(key: str) -> Lease | None:
    """The lease in force for `key`, or None if none was ever granted (or it was deleted)."""
    place = lease_object(key)
    try:
        data, generation = objects.read(place)
    except FileNotFoundError:
        return None
    return parse_lease(place, _token(data), data, generation)


def grant(key: str, holder: str, after: Lease | None, *, thread: int) -> Lease | None:
    """The lease on `key` for `holder`, following `after`; None if another process was granted it first, or its holder lives."""
    token = 1 if after is None else after.token + 1
    lease = Lease(lease_object(key), token, holder, Owner.current(thread), time.strftime("%Y-%m-%d %H:%M:%S %z"))
    try:
        return replace(lease, heartbeat=_put(lease, 0 if after is None else after.heartbeat))
    except PreconditionFailed:
        return None


def beat(lease: Lease) -> None:
    """Shows that the holder lives; does nothing if it is another's lease by now. Raises OSError if it cannot be written."""
    _replace(lease, released=False)


def restore(lease: Lease) -> None:
    """Writes the lease again after it was deleted under the holder; does nothing if anything is there."""
    try:
        _put(lease, 0)
    except PreconditionFailed:
        return


def give_back(lease: Lease) -> None:
    """Marks the lease as free for the next one at once; its number stays used."""
    _replace(lease, released=True)


def _replace(lease: Lease, *, released: bool) -> None:
    place = lease.path
    assert isinstance(place, ObjectPath)
    try:
        data, generation = objects.read(place)
        if parse_lease(place, _token(data), data, generation) == lease:
            _put(lease, generation, released=released)
    except (FileNotFoundError, PreconditionFailed):
        return  # the next look says that the lease is lost, or restores it


def _put(lease: Lease, generation: int, *, released: bool = False) -> int:
    assert isinstance(lease.path, ObjectPath)
    # nothing is written twice: who finds these bytes after a lost answer knows that they are its own
    data = json.dumps(dump_lease(lease, released=released) | {"write": uuid.uuid4().hex}) + "\n"
    return objects.write(lease.path, data.encode(), generation=generation)


def _token(data: bytes) -> int:
    """The number in a lease; 0 where it is damaged: then only its silence frees it."""
    try:
        return int(json.loads(data)["token"])
    except (ValueError, KeyError, TypeError):
        return 0
