"""Buckets beside the zones whose slices read and write them: where a bucket is, whether it can be used, and whose clock it has.

A slice reads its data and writes its checkpoints across the network. In its own region that costs nothing; from anywhere else every byte
is paid for and late.
"""

from __future__ import annotations

import datetime
import errno
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from uuid import uuid4

from tasks import objects
from tasks.findings import Finding
from tasks.object_requests import bucket_missing, send
from tasks.places import ObjectPath
from tasks.storage import StorageError

CLOCK_SECONDS = 30.0
READER_ROLE = "roles/storage.legacyBucketReader"  # roles/storage.objectUser may not read what the bucket itself is

# https://cloud.google.com/storage/docs/locations
_DUAL_REGIONS = {
    "NAM4": ("us-central1", "us-east1"),
    "EUR4": ("europe-north1", "europe-west4"),
    "EUR5": ("europe-west1", "europe-west2"),
    "EUR7": ("europe-west2", "europe-west3"),
    "EUR8": ("europe-west3", "europe-west6"),
    "ASIA1": ("asia-northeast1", "asia-northeast2"),
}
_CONTINENTS = {"US": "us", "EU": "europe", "ASIA": "asia"}


@dataclass(frozen=True)
class BucketLocation:
    """Where a bucket is: the one region or the two that it names, or a continent."""

    name: str
    regions: tuple[str, ...] = ()
    continent: str = ""

    @classmethod
    def parse(cls, resource: dict[str, object]) -> BucketLocation:
        """From `location`, `locationType` and `customPlacementConfig` of a bucket of the JSON interface."""
        name = str(resource.get("location", "")).upper()
        placement = resource.get("customPlacementConfig")
        if isinstance(placement, dict) and placement.get("dataLocations"):
            return cls(name, regions=tuple(str(region).lower() for region in placement["dataLocations"]))
        if name in _DUAL_REGIONS:
            return cls(name, regions=_DUAL_REGIONS[name])
        if name in _CONTINENTS:
            return cls(name, continent=_CONTINENTS[name])
        return cls(name, regions=(name.lower(),))


def region_of(zone: str) -> str:
    """The region of a zone: us-central2 of us-central2-b."""
    return zone.rpartition("-")[0]


def location_finding(place: ObjectPath, zones: list[str]) -> Finding:
    """Whether the bucket lies where the slices of `zones` are. Raises StorageError where the bucket is not there or does not answer."""
    asked = "location,locationType,customPlacementConfig"
    try:
        resource = send(place, "GET", "b/{}", place.bucket, fields=asked).json()
    except FileNotFoundError:
        raise bucket_missing(place) from None
    except StorageError as error:
        if error.errno != errno.EACCES:
            raise
        detail = f"where gs://{place.bucket} lies cannot be read here, so it is not compared with the zones {', '.join(zones)}"
        return Finding("bucket location", "warn", detail, f"grant {READER_ROLE} on it to this account")
    return compare_location(place.bucket, BucketLocation.parse(resource), zones)


def compare_location(bucket: str, location: BucketLocation, zones: list[str]) -> Finding:
    """Whether a bucket there suits slices in `zones`, which are tried in order: in one of them it must be near."""
    where = f"the bucket gs://{bucket} is in {location.name}"
    wanted = ", ".join(zones)
    near = [zone for zone in zones if region_of(zone) in location.regions]
    if near and len(near) == len(zones):
        return Finding("bucket location", "ok", f"{where}, like the zones {wanted}")
    if near:
        far = ", ".join(zone for zone in zones if zone not in near)
        detail = f"{where}, and of the pool's zones {far} are not: a slice there pays for every byte it reads"
        return Finding("bucket location", "warn", detail, f"leave zones outside {', '.join(location.regions)} away")
    around = [zone for zone in zones if location.continent and zone.startswith(f"{location.continent}-")]
    region = region_of(zones[0])
    remedy = (
        f"give a --root in a bucket of {region} (`gcloud storage buckets create gs://NAME --location={region}`), or zones near this one"
    )
    if around:
        detail = f"{where}, a multi-region around the zones {', '.join(around)}: what slices read from it is charged as transfer"
        return Finding("bucket location", "warn", detail, f"give a --root in a bucket of {region}")
    return Finding("bucket location", "fail", f"--root=gs://{bucket}: {where}, and the pool's slices are in {wanted}", remedy)


def use_finding(place: ObjectPath) -> Finding:
    """Whether this account can write below `place`, read it back, list and delete it."""
    probe = place / f".probe-{uuid4().hex}"
    try:
        generation = objects.write(probe, b"probe", generation=0)
        objects.read(probe)
        objects.below(probe)
        objects.delete(probe, generation=generation)
    except OSError as error:
        return Finding("bucket", "fail", f"--root={place}: {error.strerror or error}", "see docs/storage.md")
    return Finding(
        "bucket", "ok", f"{place} can be written, read, listed and deleted from here; what the slices' account may do, only they see"
    )


def storage_clock_finding(place: ObjectPath) -> Finding:
    """How far this machine's clock is from Google's. Raises StorageError, FileNotFoundError."""
    before = time.time()
    headers = send(place, "GET", "b/{}/o", place.bucket, maxResults="1", fields="nextPageToken").headers
    return clock_finding("clock, storage", headers.get("Date"), before, time.time())


def clock_finding(subject: str, date: str | None, before: float, after: float) -> Finding:
    """How far this machine's clock is from a server's.

    date: the `Date` header of its answer. before, after: this machine's clock around the request, in seconds since 1970.
    """
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return Finding(subject, "warn", f"its answer has no date that can be read ({date!r})", "compare the clocks yourself: `timedatectl`")
    # the header is cut to a whole second
    offset = (before + after) / 2 - (theirs.replace(tzinfo=theirs.tzinfo or datetime.UTC).timestamp() + 0.5)
    slack = (after - before) / 2 + 0.5
    if abs(offset) - slack <= CLOCK_SECONDS:
        return Finding(subject, "ok", f"within {abs(offset) + slack:.0f} s of this machine's")
    direction = "ahead" if offset > 0 else "behind"
    return Finding(
        subject, "warn", f"this machine's clock is {abs(offset):.0f} s {direction}", "let it be set by NTP: `timedatectl set-ntp true`"
    )
