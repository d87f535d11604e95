"""The commands beside training: `doctor`, `verify PATH`, `adopt PATH`, `rollback PATH`, `push PATH`, `report PATH`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from tasks.audit import adopt, verify_tree
from tasks.experiment import root_directory, root_place
from tasks.findings import Finding
from tasks.pipeline import label, run_steps
from tasks.places import Place
from tasks.presets import preset

# What others can have made just as well. A checkpoint or a store also holds what only our steps know.
ADOPTABLE = ("raw", "tokenizers")

console = Console(highlight=False, soft_wrap=True)


def doctor(arguments: list[str]) -> int:
    """Looks at the machine; 1 when something would make a run fail."""

    @dataclasses.dataclass(frozen=True)
    class Doctor:
        root: str | None = None
        """Where artifacts would lie, a directory or gs://bucket/prefix; unset: PREFECT_LLAMA_ROOT, else ./artifacts."""
        pool: str | None = None
        """Work pool that would train: the Prefect server, the pool, its worker, Cloud TPU and the bucket are looked at too."""

    from tasks.doctor import examine

    options = tyro.cli(Doctor, args=arguments, prog="train.py doctor", description="Check this machine, and a work pool, before a run.")
    root = root_place(options.root)
    findings = examine(root)
    if options.pool is not None:
        findings += pool_findings(options.pool, root)
    table = Table(show_edge=False, pad_edge=False)
    for column in ("", "what", "how it is", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.state, finding.subject, finding.detail, finding.remedy)
    console.print(table)
    return int(any(finding.state == "fail" for finding in findings))


def pool_findings(pool: str, root: Place) -> list[Finding]:
    """What a run on a work pool depends on beside this machine."""
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    from deployments import automations
    from deployments.tpu.doctor import cloud_findings
    from tasks import pool_doctor

    if not get_current_settings().api.url:
        remedy = "`prefect config set PREFECT_API_URL=http://HOST:4200/api`"
        return [Finding("prefect server", "fail", f"--pool={pool}: a work pool needs a server that stays, and none is set", remedy)]
    client = get_client(sync_client=True)
    findings = list(pool_doctor.server_findings(client))
    if findings[0].state == "fail":
        return findings
    findings += [*pool_doctor.pool_findings(client, pool), *automations.findings(client)]
    try:
        settings = pool_doctor.settings_of(client, pool)
    except ValueError as error:
        known = {finding.detail for finding in findings}
        return findings if str(error) in known else [*findings, Finding("work pool", "fail", str(error))]
    if settings is not None:
        findings += [*cloud_findings(settings), *pool_doctor.storage_findings(settings, root)]
    return findings


def verify(arguments: list[str]) -> int:
    """Hashes an artifact, or everything below a root; 1 when something is damaged or there is nothing."""

    @dataclasses.dataclass(frozen=True)
    class Verify:
        path: tyro.conf.Positional[str]
        """An artifact's directory, or a root with many; also gs://bucket/prefix."""

    options = tyro.cli(Verify, args=arguments, prog="train.py verify", description="Hash an artifact and compare it with its manifest.")
    report = verify_tree(options.path)
    print(report)
    return 0 if report.ok else 1


def adopt_command(arguments: list[str]) -> int:
    """Registers existing data as a finished artifact."""

    @dataclasses.dataclass(frozen=True)
    class Adopt:
        path: tyro.conf.Positional[Path]
        """The directory that holds the data. Nothing is copied; a manifest is written into it."""
        step: str
        """What it is, as kind/name: raw/plays, tokens/web."""
        provenance: str
        """Where it came from, in your words; kept in the manifest."""
        preset: str | None = None
        """Take it as the result of that step of this preset, so that its run reuses it."""
        root: str | None = None
        """Where artifacts lie; unset: PREFECT_LLAMA_ROOT, else ./artifacts."""

    options = tyro.cli(Adopt, args=arguments, prog="train.py adopt", description="Register existing data as a finished artifact.")
    kind, slash, name = options.step.partition("/")
    if not slash or not kind or not name:
        raise ValueError(f"--step={options.step!r}: give kind/name, such as raw/plays")
    step = None
    if options.preset is not None:
        if kind not in ADOPTABLE:
            raise ValueError(f"--step={options.step!r}: with --preset only the steps {', '.join(ADOPTABLE)} can be adopted")
        steps = {label(step): step for step in run_steps(preset(options.preset)).all}
        if (step := steps.get(options.step)) is None:
            raise ValueError(f"--step={options.step!r} is no step of {options.preset!r}; its steps are {', '.join(steps)}")
    artifact = adopt(options.path, root_directory(options.root), kind, name, {"source": options.provenance}, step=step)
    print(f"adopted {options.path} as {kind}/{name}, fingerprint {artifact.fingerprint[:16]}, at {artifact.path}")
    return 0


def rollback(arguments: list[str]) -> int:
    """Takes a run back before a spike of its loss, and past the data that made it."""

    @dataclasses.dataclass(frozen=True)
    class Rollback:
        path: tyro.conf.Positional[Path]
        """The run's directory, artifacts/checkpoints/NAME-..."""
        to: int
        """Step of the checkpoint to go back to, best some 100 steps before the loss rose."""
        skip: int
        """Leave out the data of so many steps after it; 200 to 500 are usual."""

    from tasks.rollback import roll_back

    description = "Take a run that is stopped back to a checkpoint and past the data after it: what helps against a spike of the loss."
    options = tyro.cli(Rollback, args=arguments, prog="train.py rollback", description=description)
    print(roll_back(options.path, to_step=options.to, skip_steps=options.skip))
    return 0


def push(arguments: list[str]) -> int:
    """Sends a run's export, with its card, to the Hugging Face hub."""

    @dataclasses.dataclass(frozen=True)
    class Push:
        path: tyro.conf.Positional[str]
        """The run's directory, artifacts/checkpoints/NAME-..., of this machine or in a bucket."""
        repo: str
        """ORG/NAME on the hub; made if it is not there."""
        revision: str | None = None
        """Branch; unset: main."""
        public: bool = False
        """Let everybody see a repository that is made."""

    from tasks.hub_push import push_export

    description = "Send a run's export to the Hugging Face hub. The token is that of the environment's HF_TOKEN."
    options = tyro.cli(Push, args=arguments, prog="train.py push", description=description, config=(tyro.conf.FlagCreatePairsOff,))
    url, notes = push_export(options.path, options.repo, public=options.public, revision=options.revision)
    for line in (f"pushed: {url}", *(f"note: {note}" for note in notes)):
        print(line)
    return 0


def report(arguments: list[str]) -> int:
    """Makes the page of a run, finished or not, anew."""

    @dataclasses.dataclass(frozen=True)
    class Report:
        path: tyro.conf.Positional[str]
        """The run's directory, artifacts/checkpoints/NAME-..., or gs://... of a finished one."""

    from tasks.run_page import write_run_page

    options = tyro.cli(Report, args=arguments, prog="train.py report", description="Show a run, finished or not, on one page: report.html.")
    print(write_run_page(options.path))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "doctor": doctor,
    "verify": verify,
    "adopt": adopt_command,
    "rollback": rollback,
    "push": push,
    "report": report,
}
