"""How many chips a project may have of what a pool asks for, as Google's Service Usage API tells it. Read by the doctor.

Metrics are told apart by their names, such as tpu.googleapis.com/tpu-v5s-litepod-preemptible: the generation is in them, and whether
they are of spot capacity, of reservations, or of serving, which no training may use. Limits are per zone, per region, or both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from model.slices import slice_named
from tasks.findings import Finding
from tasks.pool_settings import PoolSettings

ADDRESS = "SERVICE_USAGE_ADDRESS"
PAGE = "https://console.cloud.google.com/iam-admin/quotas?service=tpu.googleapis.com&project="
ANSWER_SECONDS = 30.0
_GENERATIONS = {"v4": r"v4", "v5e": r"v5s|v5e|v5-?lite", "v5p": r"v5p", "v6e": r"v6e|v6s"}


def quota_findings(settings: PoolSettings) -> list[Finding]:
    """One finding a zone; a single one where nothing can be known, which is no failure."""
    remedy = f"see {PAGE}{settings.project}"
    try:
        metrics = read_metrics(str(settings.project))
    except ValueError as error:
        return [Finding("quota", "warn", f"not known ({error})", remedy)]
    return [zone_finding(settings, zone, metrics, remedy) for zone in settings.zones]


def read_metrics(project: str) -> list[dict[str, Any]]:
    """All quota metrics of Cloud TPU in a project. Raises ValueError where they cannot be read, with the reason."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession
    from requests import RequestException

    root = os.environ.get(ADDRESS, "https://serviceusage.googleapis.com")
    found: list[dict[str, Any]] = []
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        session, page = AuthorizedSession(credentials), ""
        while True:
            answer = session.get(
                f"{root}/v1beta1/projects/{project}/services/tpu.googleapis.com/consumerQuotaMetrics",
                params={"pageSize": 200, "pageToken": page},
                timeout=ANSWER_SECONDS,
            )
            if answer.status_code == 403:
                raise ValueError("this account may not read quotas: it lacks serviceusage.quotas.get, or the Service Usage API is disabled")
            answer.raise_for_status()
            body = answer.json()
            found += body.get("metrics", [])
            page = body.get("nextPageToken", "")
            if not page:
                return found
    except (GoogleAuthError, RequestException) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def zone_finding(settings: PoolSettings, zone: str, metrics: list[dict[str, Any]], remedy: str) -> Finding:
    """Whether the quota of a zone covers the pool's slices: the largest of the metrics that could be meant, each by its lowest limit."""
    assert settings.accelerator_type is not None
    subject = f"quota, {zone}"
    kind = settings.provisioning if settings.provisioning in ("spot", "reserved") else "on-demand"
    needed = settings.num_slices * _units(settings.accelerator_type)
    limits = {str(metric["metric"]): min(of, default=None) for metric in _meant(settings, metrics) for of in [list(_limits(metric, zone))]}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    if not known:
        return Finding(subject, "warn", f"no quota of {kind} {settings.accelerator_type} is told for this project", remedy)
    name, most = max(known.items(), key=lambda item: item[1])
    told = f"{name} is {most:,.0f}" if most != float("inf") else f"{name} has no limit"
    if most < needed:
        return Finding(
            subject, "warn", f"{told}, and {settings.num_slices} x {settings.accelerator_type} needs {needed:,}", f"ask: {remedy}"
        )
    return Finding(subject, "ok", f"{told}, {needed:,} needed")


def _units(accelerator_type: str) -> int:
    """What a slice counts in quotas: the number in its name, TensorCores of v4 and v5p, chips of the others."""
    return int(slice_named(accelerator_type).name.rpartition("-")[2])


def _meant(settings: PoolSettings, metrics: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    assert settings.accelerator_type is not None
    generation = _GENERATIONS[slice_named(settings.accelerator_type).generation]
    for metric in metrics:
        name = str(metric.get("metric", "")).rpartition("/")[2].lower()
        spot, reserved = "preemptible" in name or "spot" in name, "reserved" in name
        wanted = (settings.provisioning == "spot", settings.provisioning == "reserved")
        if "serving" not in name and (spot, reserved) == wanted and re.search(rf"(?:^|[-_]){generation}", name.replace("tpu", "-")):
            yield metric


def _limits(metric: dict[str, Any], zone: str) -> Iterator[float]:
    """Every limit that holds in the zone: its own, its region's, and those without a place; for each the most particular one counts."""
    region = zone.rpartition("-")[0]
    for limit in metric.get("consumerQuotaLimits", []):
        by_place: dict[str, float] = {}
        for bucket in limit.get("quotaBuckets", []):
            place = bucket.get("dimensions", {})
            where = str(place.get("zone") or place.get("region") or "")
            if where in ("", zone, region) and "effectiveLimit" in bucket:
                value = float(bucket["effectiveLimit"])
                by_place[where] = float("inf") if value < 0 else value
        for where in (zone, region, ""):
            if where in by_place:
                yield by_place[where]
                break
