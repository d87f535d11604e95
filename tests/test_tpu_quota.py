"""What the doctor says of quotas, from the answer of Google's Service Usage API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials

from deployments.tpu import quota
from deployments.tpu.quota import quota_findings, zone_finding
from tasks.pool_settings import PoolSettings

CLOUD = PoolSettings(pool="tpu", provider="cloud", project="p", zones=("us-central2-b",), accelerator_type="v4-128")


def metric(name: str, *limits: dict[str, Any]) -> dict[str, Any]:
    return {"metric": f"tpu.googleapis.com/{name}", "consumerQuotaLimits": [{"quotaBuckets": list(limits)}]}


def bucket(limit: int, **place: str) -> dict[str, Any]:
    return {"effectiveLimit": str(limit), **({"dimensions": place} if place else {})}


HERE = {"zone": "us-central2-b"}
METRICS = [
    metric("tpu-v4s-pod-preemptible", bucket(0), bucket(256, **HERE), bucket(4096, zone="europe-west4-b")),
    metric("tpu-v4s-pod", bucket(0), bucket(64, region="us-central2")),
    metric("tpu-v4s-pod-reserved", bucket(-1)),
    metric("tpu-v5s-litepod-serving-preemptible", bucket(9999)),
    metric("tpu-v5s-litepod-preemptible", bucket(128)),
    {
        "metric": "tpu.googleapis.com/TPUV6EPreemptible",
        "consumerQuotaLimits": [{"quotaBuckets": [bucket(512, **HERE)]}, {"quotaBuckets": [bucket(0, region="us-central2")]}],
    },
]


@pytest.mark.parametrize(
    ("changed", "state", "words"),
    [
        ({}, "ok", "tpu-v4s-pod-preemptible is 256, 128 needed"),
        ({"num_slices": 4}, "warn", "tpu-v4s-pod-preemptible is 256, and 4 x v4-128 needs 512: ask: see https://console"),
        ({"provisioning": "on-demand"}, "warn", "tpu-v4s-pod is 64, and 1 x v4-128 needs 128"),
        ({"provisioning": "reserved"}, "ok", "tpu-v4s-pod-reserved has no limit"),
        ({"accelerator_type": "v5litepod-256"}, "warn", "tpu-v5s-litepod-preemptible is 128, and 1 x v5litepod-256 needs 256"),
        ({"accelerator_type": "v6e-8"}, "warn", "TPUV6EPreemptible is 0, and"),  # the zone has some, its region none
        ({"accelerator_type": "v5p-8"}, "warn", "no quota of spot v5p-8 is told for this project"),
    ],
)
def test_what_a_zone_has(changed: dict[str, Any], state: str, words: str) -> None:
    found = zone_finding(CLOUD.model_copy(update=changed), CLOUD.zones[0], METRICS, "see https://console")
    assert (found.state, words in str(found)) == (state, True), found


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The API of one project, two metrics a page; "status" changes what it answers."""
    told: dict[str, Any] = {"status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlparse(self.path)
            assert asked.path == "/v1beta1/projects/p/services/tpu.googleapis.com/consumerQuotaMetrics"
            first = int(parse_qs(asked.query).get("pageToken", ["0"])[0])
            more = {"nextPageToken": str(first + 2)} if first + 2 < len(METRICS) else {}
            self.send_response(told["status"])
            self.end_headers()
            self.wfile.write(json.dumps({"metrics": METRICS[first : first + 2], **more}).encode())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv(quota.ADDRESS, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), None))
    yield told
    server.shutdown()
    server.server_close()


def test_all_pages_are_read_and_what_cannot_be_known_is_said(service: dict[str, Any]) -> None:
    (found,) = quota_findings(CLOUD.model_copy(update={"provisioning": "reserved"}))
    assert (found.subject, found.state) == ("quota, us-central2-b", "ok")
    assert quota_findings(CLOUD.model_copy(update={"accelerator_type": "v6e-8"}))[0].detail.startswith(
        "tpu.googleapis.com/TPUV6EPreemptible"
    )
    service["status"] = 403
    (found,) = quota_findings(CLOUD)
    assert found.state == "warn"
    assert "lacks serviceusage.quotas.get" in found.detail
    service["status"] = 500
    assert "not known (HTTPError: 500" in quota_findings(CLOUD)[0].detail
