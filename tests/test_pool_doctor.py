"""The doctor's look at a work pool: clocks, the Prefect server, workers, automations, and Cloud TPU in each zone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from deployments.tpu import cloud as cloud_module
from deployments.tpu import doctor, quota
from deployments.tpu.emulator.refusal import Refusal
from deployments.tpu.emulator.service import Service
from tasks.bucket_checks import clock_finding, storage_clock_finding
from tasks.places import ObjectPath
from tasks.pool_doctor import server_findings
from tasks.pool_settings import PoolSettings
from tests.object_store import use_store
from tests.simulated_slices import made_clouds

CLOUD = PoolSettings(pool="tpu", provider="cloud", project="p", zones=("us-central2-b", "us-east5-a"), accelerator_type="v4-16")


@pytest.mark.parametrize(
    ("offset", "state", "words"),
    [(0, "ok", "within"), (-29, "ok", "within"), (600, "warn", "600 s ahead"), (-3600, "warn", "3600 s behind")],
)
def test_clocks(offset: float, state: str, words: str) -> None:
    ours = 1_700_000_000.0 + offset
    found = clock_finding("clock", formatdate(1_700_000_000.0, usegmt=True), ours, ours + 1.0)
    assert found.state == state
    assert words in found.detail
    assert bool(found.remedy) == (state == "warn")


def test_an_answer_without_a_date() -> None:
    for date in (None, "yesterday"):
        assert clock_finding("clock", date, 0.0, 0.0).state == "warn"


@contextmanager
def dated_server(seconds: float) -> Iterator[str]:
    """Answers every GET with an empty object of JSON and a `Date` of so many seconds from now."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + seconds, usegmt=True)

        def do_GET(self) -> None:
            body = b'"3.8.8"' if self.path.endswith("/admin/version") else b"{}"
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_clock_of_storage_and_of_the_prefect_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import SyncPrefectClient

    with dated_server(600.0) as url:
        use_store(monkeypatch, url)
        found = storage_clock_finding(ObjectPath("bucket", "runs"))
        assert (found.state, "s behind" in found.detail) == ("warn", True), found
        version, clock = server_findings(SyncPrefectClient(f"{url}/api"))
    assert (version.state, "runs Prefect 3.8.8" in version.detail) == ("ok", True)
    assert (clock.state, "s behind" in clock.detail) == ("warn", True), clock
    (away,) = server_findings(SyncPrefectClient("http://127.0.0.1:9/api"))
    assert away.state == "fail"
    assert "start it (`prefect server start`)" in away.remedy


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    with made_clouds(tmp_path) as make:
        yield make


def look(service: Service, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> list[Any]:
    monkeypatch.setenv(doctor.API_ADDRESS, service.start())
    monkeypatch.setattr(quota, "read_metrics", lambda _: [])
    return doctor.cloud_findings(CLOUD.model_copy(update=changed))


def test_cloud_tpu_answers_and_offers_the_slice(clouds: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    *zones, first, second = look(clouds(), monkeypatch)
    assert [zone.subject for zone in zones] == ["cloud tpu, us-central2-b", "cloud tpu, us-east5-a"]
    assert {zone.state for zone in zones} == {"ok"}
    assert "offers v4-16, has 0 queued resources" in zones[0].detail
    assert [first.subject, second.subject] == ["quota, us-central2-b", "quota, us-east5-a"]
    assert "console.cloud.google.com/iam-admin/quotas" in first.remedy
    missing, *_ = look(clouds(), monkeypatch, accelerator_type="v4-15", zones=("us-central2-b",))
    assert (missing.state, missing.detail) == ("fail", "accelerator_type=v4-15 is not offered there")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "give it the role roles/tpu.admin"),
        (grpc.StatusCode.UNAUTHENTICATED, "gcloud auth application-default login"),
        (grpc.StatusCode.NOT_FOUND, "correct project and zones"),
        (grpc.StatusCode.UNAVAILABLE, "did not answer within"),
    ],
)
def test_cloud_tpu_refuses(clouds: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode, words: str) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(cloud_module, "FIRST_PAUSE_SECONDS", 0.05)

    def around(method: str, request: Any, call: Callable[[], Any]) -> Any:
        raise Refusal(code, "injected")

    found, *_ = look(clouds(around=around), monkeypatch, zones=("us-central2-b",))
    assert found.state == "fail"
    assert words in str(found)


def test_what_is_not_asked_and_what_cannot_be() -> None:
    assert doctor.cloud_findings(CLOUD.model_copy(update={"provider": "local"}))[0].state == "ok"
    (found,) = doctor.cloud_findings(CLOUD.model_copy(update={"project": None, "zones": ()}))
    assert (found.state, found.detail) == ("fail", "provider=cloud needs project and zones")
