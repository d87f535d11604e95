"""What every host of a slice does at boot: its place in the run, its command, its secrets, its report; against a metadata server."""

from __future__ import annotations

import ast
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deployments.tpu import host_agent
from deployments.tpu.emulator.metadata import MetadataServer
from deployments.tpu.host_agent import Metadata, Place, command_line
from deployments.tpu.request import CHECKOUT, HOST_MODULES, shutdown_script
from tests.host_boot import boot, launch

TPU_ENV = "ACCELERATOR_TYPE: 'v4-16'\nWORKER_ID: '1'"
MULTISLICE = f"{TPU_ENV}\nMEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'"


@pytest.fixture
def attributes() -> dict[str, str]:
    return {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2",
        "tpu-env": TPU_ENV,
        "enable-guest-attributes": "TRUE",
    }


@pytest.fixture
def server(attributes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    server = MetadataServer(lambda: attributes, project="p", zone="z")
    monkeypatch.setenv("GCE_METADATA_HOST", server.address)
    yield server
    server.close()


def said(server: MetadataServer) -> dict[str, str]:
    return {key: value for (namespace, key), value in server.guest_attributes.items() if namespace == host_agent.NAMESPACE}


def test_a_host_of_one_slice(server: MetadataServer) -> None:
    place = Place(Metadata(), 8476)
    assert (place.process, place.processes, place.coordinator) == (1, 2, "10.0.0.1:8476")
    assert place.environment() == {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_a_host_of_the_third_slice(server: MetadataServer, attributes: dict[str, str]) -> None:
    attributes["tpu-env"] = MULTISLICE
    place = Place(Metadata(), 8476)
    assert (place.process, place.processes, place.coordinator) == (5, 6, "10.0.0.9:8476")


def test_the_only_host_needs_nobody(server: MetadataServer, attributes: dict[str, str]) -> None:
    attributes |= {"agent-worker-number": "0", "worker-network-endpoints": "unknown:unknown:10.0.0.1"}
    assert Place(Metadata(), 8476).environment() == {}


def test_a_boot_runs_the_followers_command_and_reports(server: MetadataServer, attributes: dict[str, str], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = f"import json, os, sys; json.dump([json.load(open(sys.argv[1])), dict(os.environ)], open({str(found)!r}, 'w')); sys.exit(7)"
    attributes[host_agent.LAUNCH] = json.dumps(launch(command))
    process = boot(tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7, output
    job, environment = json.loads(found.read_text())
    assert job == {"name": "a job"}
    assert environment["OWN"] == "value"
    assert environment["JAX_PROCESS_ID"] == "1"
    assert said(server) == {"exit_code": "7", "error": "", "phase": "ended", "process": "1"}


def test_told_to_stop_it_passes_that_on_and_says_so(server: MetadataServer, attributes: dict[str, str], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    saves = (
        "import pathlib, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        f"pathlib.Path({str(ready)!r}).touch(); signal.pause()"
    )
    attributes[host_agent.LAUNCH] = json.dumps(launch(saves))
    process = boot(tmp_path)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert said(server)["exit_code"] == host_agent.TERMINATED


def test_what_an_earlier_boot_reported_is_over(server: MetadataServer, attributes: dict[str, str], tmp_path: Path) -> None:
    Metadata().report("exit_code", "1")
    attributes[host_agent.LAUNCH] = json.dumps(launch("import signal; signal.pause()"))
    process = boot(tmp_path)
    deadline = time.monotonic() + 60
    while said(server).get("phase") != "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert said(server)["exit_code"] == ""
    process.kill()
    process.communicate()


def test_without_its_orders_it_says_what_is_wrong(server: MetadataServer, tmp_path: Path) -> None:
    process = boot(tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: HTTP Error 404" in output
    assert said(server)["exit_code"] == "1"
    assert "404" in said(server)["error"]


class SecretManager(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        allowed = self.headers["Authorization"].startswith("Bearer ") and self.path == "/v1/projects/p/secrets/key/versions/latest:access"
        self.send_response(200 if allowed else 403)
        self.end_headers()
        if allowed:
            self.wfile.write(json.dumps({"payload": {"data": base64.b64encode(b"canary").decode()}}).encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def secret_manager() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SecretManager)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_secrets_reach_the_command_alone(server: MetadataServer, attributes: dict[str, str], secret_manager: str, tmp_path: Path) -> None:
    found = tmp_path / "found"
    command = f"import os; open({str(found)!r}, 'w').write(os.environ['WANDB_API_KEY'])"
    attributes["agent-worker-number"] = "0"
    told = launch("pass", leader=[sys.executable, "-c", command], secrets={"WANDB_API_KEY": "projects/p/secrets/key"})
    attributes[host_agent.LAUNCH] = json.dumps(told)
    output, _ = boot(tmp_path, SECRET_MANAGER_ADDRESS=secret_manager).communicate(timeout=60)
    assert found.read_text() == "canary", output
    assert "canary" not in output
    assert "canary" not in str(server.guest_attributes)


def test_followers_get_no_secrets(server: MetadataServer, attributes: dict[str, str], secret_manager: str, tmp_path: Path) -> None:
    command = "import os, sys; sys.exit('WANDB_API_KEY' in os.environ)"
    attributes[host_agent.LAUNCH] = json.dumps(launch(command, secrets={"WANDB_API_KEY": "projects/p/secrets/key"}))
    assert boot(tmp_path, SECRET_MANAGER_ADDRESS=secret_manager).wait(60) == 0


def test_a_secret_that_may_not_be_read_names_the_role(
    server: MetadataServer, attributes: dict[str, str], secret_manager: str, tmp_path: Path
) -> None:
    attributes["agent-worker-number"] = "0"
    attributes[host_agent.LAUNCH] = json.dumps(launch("pass", secrets={"HF_TOKEN": "projects/p/secrets/other"}))
    output, _ = boot(tmp_path, SECRET_MANAGER_ADDRESS=secret_manager).communicate(timeout=60)
    assert "cannot read the secret projects/p/secrets/other for HF_TOKEN (HTTP 403)" in output
    assert "roles/secretmanager.secretAccessor" in said(server)["error"]
    assert said(server)["exit_code"] == str(host_agent.REFUSED)  # another slice would meet it again


def test_with_an_image_the_command_runs_in_it(server: MetadataServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_agent, "CACHE_DIRECTORY", tmp_path / "cache")
    monkeypatch.setattr(host_agent, "DEVICES", tmp_path / "no-devices")
    place = Place(Metadata(), 1)
    told = launch("pass", image="host/image@sha256:1", directory=None)
    command, _, environment = command_line(told, place, {"WANDB_API_KEY": "canary", "CERTIFICATE": "two\nlines"}, tmp_path)
    assert command[:2] == ["docker", "run"]
    assert {"--rm", "--init", "--privileged", "--net=host", "memlock=-1:-1"} < set(command)
    assert command[command.index("host/image@sha256:1") + 1 :] == [sys.executable, "-c", "pass", str(tmp_path / "shared" / "job.json")]
    mounted = {argument for argument in command if argument.startswith("/") and ":" in argument}
    assert mounted == {f"{tmp_path}/{name}:{tmp_path}/{name}" for name in ("shared", "cache")}
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o777 for name in ("shared", "cache"))  # the image's user is no root
    assert "canary" not in " ".join(command)  # which every process of the host could read
    listed = Path(command[command.index("--env-file") + 1])
    assert listed.parent == tmp_path  # outside of what is mounted
    assert listed.read_text() == "WANDB_API_KEY=canary\n"
    assert listed.stat().st_mode & 0o777 == 0o600
    assert "WANDB_API_KEY" not in environment
    assert command[command.index("--env") + 1] == "CERTIFICATE"  # whose lines no such file can hold
    assert environment["CERTIFICATE"] == "two\nlines"


def test_the_shutdown_script_tells_the_agent_and_waits_for_it(tmp_path: Path) -> None:
    """The agent is a service's grandchild that systemd leaves alone; what it is called is how it is found."""
    name, ended = f"pl-{os.getpid()}", tmp_path / "ended"
    program = (
        "import pathlib, signal, sys, time; from deployments.tpu.host_agent import take_name\n"
        f"def stop(*_): time.sleep(0.5); pathlib.Path({str(ended)!r}).touch(); sys.exit(0)\n"
        f"signal.signal(signal.SIGTERM, stop); take_name({name!r}); print('ready', flush=True); signal.pause()"
    )
    script = tmp_path / "shutdown-script"
    script.write_text(shutdown_script(name))
    script.chmod(0o700)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as agent:
        reaper = Thread(target=agent.wait, daemon=True)
        assert agent.stdout is not None
        assert agent.stdout.readline() == "ready\n"
        reaper.start()
        subprocess.run([script], check=True, timeout=60)
        assert ended.exists()
    subprocess.run([script], check=True, timeout=60)  # nobody is there to be told


def test_every_user_of_the_image_may_use_the_chips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vfio").mkdir()
    for name in ("accel0", "vfio/vfio", "vfio/12"):
        os.mkfifo(tmp_path / name)  # a character device can be made by root alone
        (tmp_path / name).chmod(0o600)
    (tmp_path / "vfio" / "notes").touch(0o600)
    monkeypatch.setattr(host_agent, "DEVICES", tmp_path)
    monkeypatch.setattr(host_agent, "CACHE_DIRECTORY", tmp_path / "cache")
    monkeypatch.setattr(Path, "is_char_device", Path.is_fifo)
    (tmp_path / "work").mkdir()
    host_agent.docker_run(tmp_path / "environment", tmp_path / "work")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if not path.is_dir()}
    assert modes == {"accel0": 0o666, "vfio": 0o666, "12": 0o666, "notes": 0o600}


@pytest.mark.parametrize(("image", "registry"), [("us-docker.pkg.dev/p/r/i@sha256:1", "us-docker.pkg.dev"), ("ghcr.io/o/i@sha256:1", None)])
def test_an_image_of_googles_is_pulled_with_the_hosts_account(
    server: MetadataServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, registry: str | None
) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho "$@ <" $([ "$1" = login ] && cat) "> $DOCKER_CONFIG" >> "$0.calls"\n')
    docker.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    host_agent.pull(image, Metadata())
    *logins, pulled = (tmp_path / "docker.calls").read_text().splitlines()
    assert pulled.startswith(f"pull --quiet {image} <")
    assert [line.split(" > ")[0] for line in logins] == (
        [f"login --username oauth2accesstoken --password-stdin https://{registry} < emulated"] if registry else []
    )
    assert not Path(pulled.split(" > ")[1]).exists()  # what the login left


def test_the_cache_can_be_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "mount"
    mount.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\n')
    mount.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(host_agent, "CACHE_DIRECTORY", tmp_path / "cache")
    host_agent.keep_cache_in_memory()
    assert (tmp_path / "mount.calls").read_text().split() == [
        *("-t", "tmpfs", "-o", "size=70%,mode=0777", "prefect-llama", str(tmp_path / "cache"))
    ]
    monkeypatch.setattr(os.path, "ismount", lambda place: place == tmp_path / "cache")
    host_agent.keep_cache_in_memory()  # as another boot without a reboot in between
    assert len((tmp_path / "mount.calls").read_text().splitlines()) == 1


def test_it_needs_the_standard_library_alone() -> None:
    for module in HOST_MODULES:
        tree = ast.parse((Path(host_agent.__file__).parent / f"{module}.py").read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        others = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
        assert others <= {f"deployments.tpu.{other}" for other in HOST_MODULES}
