"""The documentation: every command in it is one, every field of the configuration is in its reference, every link leads somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
from cyclopts import CycloptsError
from mkdocs.commands.build import build
from mkdocs.config import load_config
from prefect.cli._app import _app as prefect_cli

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
# What is not ours to check, and why it stands in the documentation.
OTHERS = {
    "gcloud": "Google's command line, not among our packages",
    "kubectl": "of a cluster's",
    "pip": "asks a package index; what it installs is named once, in pyproject.toml, or belongs to another environment",
    "printf": "the shell's own",
    "for": "the shell's own",
    "done": "the shell's own",
    "docker": "builds an image on a machine that has it",
    "export": "the shell's own",
    "touch": "creates a file that the trainer looks for",
}


class Understood(BaseException):
    """A command line was parsed whole; nothing is to run."""


def commands() -> list[tuple[str, str]]:
    """`(page, command)` of every line in the blocks marked `sh`."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if words(line)]
    return found


def words(line: str) -> list[str]:
    """The first command of a shell line, without what the shell itself takes: comments, NAME=value before it, redirections."""
    found = list(
        itertools.takewhile(lambda word: word not in (">", "|", "&&", ";"), shlex.split(re.sub(r"\$\(.*?\)", "VALUE", line), comments=True))
    )
    return list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), found))


@pytest.fixture
def _only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parse: Callable[..., Any] = tyro.cli

    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Understood

    monkeypatch.setattr(tyro, "cli", parse_and_stop)


@pytest.mark.usefixtures("_only_parsed")
@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_understood(page: str, command: str) -> None:
    match words(command):
        case ["python", script, *arguments] if script.endswith(".py"):
            check_script(script, arguments)
        case ["python", "-m", module, *arguments]:
            check_module(module, arguments)
        case ["prefect", *arguments]:
            arguments = [word for word in arguments if word != "--no-prompt"]  # of every command, taken off before its own are parsed
            prefect_cli.parse_args(arguments, exit_on_error=False, print_error=False)
        case ["make", *arguments]:
            check_targets([word for word in arguments if "=" not in word])
        case [program, *_]:
            assert program in OTHERS


def check_script(script: str, arguments: list[str]) -> None:
    """A file of flows/ takes these arguments; of an experiment, which takes those of the main job, the file is there."""
    assert (CHECKOUT / script).exists()
    if "/experiments/" in script:
        return
    module = "flows.command_line" if script == "flows/train.py" else script.removesuffix(".py").replace("/", ".")
    if importlib.util.find_spec(f"{module}_command"):  # light imports for the terminal, beside the flow
        module += "_command"
    commands_of = importlib.import_module(module)
    run = getattr(commands_of, "run_command", None) or commands_of.main
    said = run_quietly(lambda: run(arguments))
    assert said is None, said


def check_module(module: str, arguments: list[str]) -> None:
    """The module can be run; of the preflight, also the arguments."""
    assert importlib.util.find_spec(module) is not None
    if module == "model.preflight":
        run = importlib.import_module("model.preflight.command_line").run
        assert run_quietly(lambda: run(arguments)) is None


def run_quietly(command: Callable[[], int]) -> str | None:
    """None where the command line was understood, else how it ended."""
    try:
        return f"ended with {command()}"
    except Understood:
        return None
    except SystemExit as end:
        return None if end.code == 0 else f"exit status {end.code}"


def check_targets(targets: list[str]) -> None:
    """The Makefile has all of them."""
    there = re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(targets) <= set(there)


def test_targets_named_in_the_text_are_there() -> None:
    for page in PAGES:
        check_targets(re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8")))


@pytest.mark.usefixtures("_only_parsed")
@pytest.mark.parametrize(
    "command",
    [
        "python flows/train.py --train.num-train-step 5",
        "python flows/nothing.py",
        "python -m model.nothing",
        "prefect work-pool crate --type tpu tpu",
        "prefect deployment run a/b --parm x=1",
        "make nothing",
        "rm -r artifacts",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, CycloptsError)):
        test_a_command_is_understood("", command)


def test_paths_named_in_the_text_are_there() -> None:
    for page in PAGES:
        for path in re.findall(
            r"`((?:flows|tasks|model|deployments|tests|docs|benchmarks)/[\w/.]*\w\.(?:py|md|json))`", page.read_text(encoding="utf-8")
        ):
            assert (CHECKOUT / path).exists(), f"{page.name}: {path}"


def test_the_site_is_built_with_every_field_and_no_broken_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from docs.reference_pages import PAGES as REFERENCE
    from docs.reference_pages import with_nested

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(CHECKOUT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    for path, (_, _, roots) in REFERENCE.items():
        html = (tmp_path / path.replace(".md", ".html")).read_text(encoding="utf-8")
        assert not re.findall(r'<script[^>]+src="(?:https?:)?//|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(?:https?:)?//', html)
        for root in roots:
            assert f">{root.__name__}<" in html
            for name in root.model_fields:
                assert f"<code>{name}</code>" in html
    everything = "".join((tmp_path / path.replace(".md", ".html")).read_text(encoding="utf-8") for path in REFERENCE)
    for roots in (entry[2] for entry in REFERENCE.values()):
        for each in (inner for root in roots for inner in with_nested(root)):
            assert f'id="{each.__name__.lower()}"' in everything


def test_the_reference_tells_identity_from_runtime() -> None:
    from docs.reference_pages import pages

    rows = {line.split("|")[1].strip(): line for line in pages()["reference/training.md"].splitlines() if line.startswith("| `")}
    assert rows["`learning_rate`"].startswith("| `learning_rate` | `float`, > 0 | *required* | identity | Peak")
    assert rows["`steps_per_log`"].startswith("| `steps_per_log` | `int`, ≥ 1 | `10` | runtime |")
