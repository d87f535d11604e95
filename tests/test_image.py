"""The image of a slice's hosts: its smoke test, run here; and what can be read off its Dockerfile without Docker."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments.tpu import smoke

CHECKOUT = Path(__file__).resolve().parent.parent
DOCKERFILE = CHECKOUT / "deployments" / "tpu" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8")).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64")
def test_the_smoke_test_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == [check.__name__ for check in smoke.CHECKS]
    assert lines[5] == "ok       libtpu: libtpu describes a slice of 32 chips"


def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "distributions", lambda: [SimpleNamespace(metadata={"Name": "JAX"}, version="0.1")])


def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0)


def writable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 2000)


def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    writable(monkeypatch)
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)


def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "entry_points", lambda **_: ())


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (smoke.locked, other_version, "not the versions of requirements.lock: jax 0.1"),
        (smoke.image, root, "the user is root: end the image with USER"),
        (smoke.image, writable, "user 2000 can write"),
        (smoke.image, compilers, "there are compilers: gcc"),
        (smoke.worker_type, not_installed, "no entry point prefect_llama_tpu"),
    ],
)
def test_what_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    check: Callable[[], str],
    broken: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    broken(monkeypatch)
    monkeypatch.setattr(smoke, "CHECKS", (check,))
    assert smoke.main([]) == 1
    assert f"problem  {check.__name__}: {message}" in capsys.readouterr().out


def test_it_is_pinned() -> None:
    (pinned,) = [rest for name, rest in instructions() if name == "ARG"]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", pinned)
    assert {rest.partition(" AS ")[0] for name, rest in instructions() if name == "FROM"} == {"${PYTHON_IMAGE}"}
    installs = [command for name, rest in instructions() if name == "RUN" for command in rest.split(" && ") if " install " in command]
    assert len(installs) == 3
    (own,) = [command for command in installs if "--require-hashes" not in command]
    assert "--no-deps --no-build-isolation" in own  # this project itself: nothing else comes along
    assert "://" not in DOCKERFILE.read_text(encoding="utf-8")


def test_it_ends_as_another_than_root_with_the_smoke_test() -> None:
    last = instructions()[-2:]
    assert last[0][0] == "USER"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last[0][1])
    assert last[1] == ("RUN", "JAX_PLATFORMS=cpu python -m deployments.tpu.smoke --image")


def test_what_it_copies_is_there_and_nothing_else_is_sent() -> None:
    copied = {source for name, rest in instructions() if name == "COPY" and not rest.startswith("--from") for source in rest.split()[:-1]}
    sent = {line[1:] for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent
    assert all((CHECKOUT / source).exists() for source in copied)
