"""Steps under Prefect with their artifacts in a bucket: the same fingerprints and bytes as on disk, on any machine, once."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from prefect_gcp import GcpCredentials

from flows.train import train_llama
from tasks import object_requests, objects
from tasks.artifacts import Artifact, read_manifest
from tasks.data_plan import is_here
from tasks.experiment import resolve_run
from tasks.pipeline import run_steps
from tasks.places import ObjectPath, Place, place_of, working_directory
from tasks.plan_text import plan_rows
from tasks.planning import plan_run
from tasks.storage import StorageError
from tests.object_store import BUCKET, faulty_proxy, object_store, one_in_five
from tests.step_flow import read_until, runs, start, states, steps, two_steps


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    """A Prefect server for this file; returns its API URL."""
    with prefect_test_harness(server_startup_timeout=120), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture(autouse=True)
def machine(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Calling it is going to another machine, by its name."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store)

    def go_to(name: str) -> None:
        monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / name))

    go_to("first")
    return go_to


@pytest.fixture
def root() -> str:
    return f"gs://{BUCKET}/{uuid.uuid4().hex}"


def test_another_machine_reuses_every_step_and_brings_what_the_next_one_needs(root: str, machine):
    first = two_steps(root)
    assert runs(root) == ["raw", "tokens"]
    assert first.path == f"{root}/tokens/x-{steps()[1].fingerprint[:16]}"
    machine("second")
    second = two_steps(root, return_state=True)
    assert second.result() == first
    assert states(second.state_details.flow_run_id) == {"raw x": "Cached", "tokens x": "Cached"}
    assert not working_directory(place_of(root)).exists()
    objects.delete(ObjectPath.parse(first.path) / "manifest.json")
    assert two_steps(root) == first
    assert runs(root) == ["tokens"]
    assert objects.read(ObjectPath.parse(first.path) / "tokens.txt")[0] == b"ALPHA"


def test_damage_is_a_miss_that_is_rebuilt_and_said(root: str, caplog: pytest.LogCaptureFixture):
    artifact = two_steps(root)
    objects.write(ObjectPath.parse(artifact.path) / "tokens.txt", b"OMEGA", generation=None)
    assert two_steps(root) == artifact
    assert runs(root) == ["raw", "tokens", "tokens"]
    assert any("tokens.txt has other contents" in message and message.endswith("; rebuilding") for message in caplog.messages)
    assert objects.read(ObjectPath.parse(artifact.path) / "tokens.txt")[0] == b"ALPHA"


def test_forced_it_is_made_again(root: str):
    artifact = two_steps(root)
    assert two_steps(root, force=True) == artifact
    assert runs(root) == ["raw", "tokens", "raw"]


@pytest.mark.slow
def test_a_killed_process_is_replaced_by_the_one_that_waits_for_it(root: str, server: str):
    victim = start(root, server)
    read_until(victim, "raw x runs: first run of this step")
    waiter = start(root, server)
    read_until(waiter, f":{victim.pid}, which has been running this step since")
    assert read_manifest(steps()[0].directory(root)) is None
    victim.kill()
    victim.communicate()
    output, log = waiter.communicate(timeout=120)
    assert output.strip() == str(steps()[1].directory(root)), log
    assert "which no longer runs" in log
    assert "an earlier run of this step did not finish: it continues" in log
    assert runs(root) == ["raw", "raw", "tokens"]


def content(place: Place) -> bytes:
    return place.read_bytes() if isinstance(place, Path) else objects.read(place)[0]


def contents(artifacts: list[Artifact]) -> dict[str, tuple[str, dict[str, str]]]:
    """By step: the fingerprint, and the sha256 of each file as it lies there. Left out is when a source file came."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for artifact in artifacts:
        manifest, place = read_manifest(artifact.path), place_of(artifact.path)
        assert manifest is not None
        names = [entry.path for entry in manifest.files if entry.path != "provenance.json"]
        digests = {name: hashlib.sha256(content(place / name)).hexdigest() for name in names}
        found[f"{artifact.kind}/{artifact.name}"] = (artifact.fingerprint, digests)
    return found


def test_the_data_steps_leave_the_same_bytes_as_on_disk_and_a_plan_knows_them(root: str, tmp_path: Path, machine):
    in_bucket = train_llama(root=root, only="tokens/")
    on_disk = train_llama(root=str(tmp_path / "disk"), only="tokens/")
    assert contents(in_bucket) == contents(on_disk)
    assert len(in_bucket) == 5
    config = resolve_run("debug")
    tokens = run_steps(config).data.tokens
    assert all(is_here(step, place_of(root)) for step in tokens)
    machine("second")
    plan = plan_run(config, root)
    rows = {name: (action, why) for name, action, why in plan_rows(plan)}
    assert rows["tokens/plays"] == ("reuse", str(tokens[0].directory(root)))
    assert rows["mixtures/shakespeare"] == rows["checkpoints/debug"] == ("run", "first run of this step")
    assert not any(component.measured for component in plan.components)
    assert not any(is_here(step, place_of(root)) for step in tokens)
    assert list(working_directory(place_of(root)).iterdir()) == []


@pytest.mark.slow
def test_a_mixture_with_one_fault_in_five_is_the_mixture_without(store: str, root: str, tmp_path: Path, monkeypatch, machine):
    with faulty_proxy(store, one_in_five(seed=4)) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        faulty = train_llama(root=root, only="mixtures/")
        machine("second")  # which has to bring all inputs
        objects.delete(ObjectPath.parse(faulty[-1].path) / "manifest.json")
        again = train_llama(root=root, only="mixtures/")
    assert proxy.seen["requests"] > 300
    assert sum(proxy.seen[kind] for kind in (503, 429, "reset", "lost")) > proxy.seen["requests"] / 8
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store)
    on_disk = train_llama(root=str(tmp_path / "disk"), only="mixtures/")
    assert contents(faulty) == contents(again) == contents(on_disk)
    print(f"{proxy.seen}")


def test_credentials_come_from_a_block_of_prefect(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    account = {"type": "service_account", "client_email": "data@mine.iam.gserviceaccount.com", "private_key": pem, "project_id": "mine"}
    block: Any = GcpCredentials(service_account_info={**account, "token_uri": "https://oauth2.googleapis.com/token"})
    block.save("storage")
    assert object_requests.credentials_of("storage").service_account_email == account["client_email"]
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("PREFECT_LLAMA_GCP_CREDENTIALS", "elsewhere")
    with pytest.raises(StorageError, match=r"PREFECT_LLAMA_GCP_CREDENTIALS='elsewhere'.*Make it in the Prefect UI"):
        objects.read(ObjectPath.parse(root) / "x")
