"""One flow run's request to Cloud TPU: names, labels, metadata. Data alone; `deployments.tpu.cloud` sends it."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from deployments.tpu.environment import generation_environment
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.host_agent import AGENT, LAUNCH

HOST_MODULES = ("host_log", "host_agent")  # in the order in which they import each other
CHECKOUT = Path(__file__).resolve().parents[2]
COORDINATOR_PORT = 8476
PREFIX = "pl"

POOL_LABEL = "prefect-work-pool"
RUN_LABEL = "prefect-flow-run-id"
# The worker has the slice alone when it decides, so the slice carries what the run may use up.
LIMIT_LABELS = ("max-preemptions", "max-failures", "num-zones", "max-wait-seconds", "max-active-seconds")


@dataclass(frozen=True)
class SliceName:
    """`pl-<flow run>-<attempt>`: the same attempt has the same name, whoever asks for it and however often."""

    flow_run: UUID
    attempt: int

    def __str__(self) -> str:
        return f"{PREFIX}-{self.flow_run.hex}-{self.attempt}"

    @classmethod
    def parse(cls, name: str) -> SliceName | None:
        """The name in the last part of a resource's path; None where it is not one of ours."""
        match = re.fullmatch(rf"(?:.*/)?{PREFIX}-([0-9a-f]{{32}})-(\d+)", name)
        return cls(UUID(match[1]), int(match[2])) if match else None


def label(text: str) -> str:
    """`text` as a label's value may be: lower case, 63 characters."""
    return re.sub(r"[^-a-z0-9_]+", "_", text.lower())[:63]


def labels(configuration: TPUJobConfiguration, flow_run: UUID, pool: str) -> dict[str, str]:
    """By what a worker that knows nothing finds the slice again, and what its run may use up; beside a person's own, for their bills."""
    seconds = configuration.max_active_seconds
    limits = {
        "max-preemptions": configuration.max_preemptions,
        "max-failures": configuration.max_failures,
        "num-zones": len(configuration.places),
        "max-wait-seconds": int(configuration.valid_until * 3600),
        "max-active-seconds": "none" if seconds == float("inf") else int(seconds),
    }
    own = {label(name): label(str(value)) for name, value in configuration.labels.items() if "/" not in name}  # Prefect's have one
    return own | {POOL_LABEL: label(pool), RUN_LABEL: str(flow_run), **{name: str(limits[name]) for name in LIMIT_LABELS}}


def bucket_root(job: dict[str, Any]) -> str | None:
    """The root of a job's artifacts, `gs://bucket/prefix`, where that is in a bucket; what the job makes is `{root}/checkpoints/{run}`."""
    match = re.fullmatch(r"(gs://[^/]+.*)/[^/]+/[^/]+", job.get("bucket") or "")
    return match[1] if match else None


def log_directory(configuration: TPUJobConfiguration, parameters: dict[str, Any], name: SliceName) -> str | None:
    """Where the hosts of a slice bring their logs; None where these stay on the hosts, which `local` shows on this machine."""
    root = bucket_root(parameters.get("job", {}))
    return f"{root}/logs/{name.flow_run}/{name.attempt}" if root and configuration.provider == "cloud" else None


def host_environment(configuration: TPUJobConfiguration) -> dict[str, str]:
    """What every host's command finds in its environment: what its chips need, and what a person set, which prevails."""
    found: dict[str, str] = {}
    if configuration.provider == "cloud":
        found = generation_environment(configuration.tpu_slice.generation, configuration.num_slices)
    return found | {key: str(value) for key, value in configuration.env.items() if value is not None}


def startup_script() -> str:
    """The program that every host runs at boot: the modules of HOST_MODULES in one file, which needs Python 3.10 and no package."""
    here = Path(__file__).parent
    sources = {f"{__package__}.{name}": here.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in HOST_MODULES}
    program = f"""\
        #!/usr/bin/env python3
        import sys, types
        for name, source in {sources!r}.items():
            sys.modules[name] = types.ModuleType(name)
            exec(compile(source, name, "exec"), sys.modules[name].__dict__)
        sys.exit(sys.modules[name].main())
        """
    return textwrap.dedent(program)


def shutdown_script(agent: str = AGENT) -> str:
    """What a host runs when it goes down: tells the startup script, which systemd leaves alone (KillMode=process), and waits for it.

    agent: what the startup script calls its process.
    """
    return f"#!/bin/sh\npkill -TERM -x {agent} || exit 0\nwhile pgrep -x {agent} > /dev/null; do sleep 0.2; done\n"


def metadata(
    configuration: TPUJobConfiguration, parameters: dict[str, Any], python: str, port: int, logs: str | None = None
) -> dict[str, str]:
    """The slice's metadata: the script that every host runs, and what it is to run.

    Args:
        parameters: the flow run's; "job" is what followers get.
        python: the interpreter of this machine, for hosts that are its processes.
        port: where process 0 is found by the others.
        logs: the `log_directory`.
    """
    local = configuration.provider == "local"
    interpreter = python if local else "python" if configuration.image else ".venv/bin/python"
    launch = {
        "leader": [interpreter, "-m", "prefect", "flow-run", "execute"],
        "follower": [interpreter, "-m", "tasks.follower", "{job}"],
        "follower_job": parameters.get("job", {}),
        "env": host_environment(configuration),
        "secrets": configuration.secrets,
        "coordinator_port": port,
        "logs": logs,
        "cache_in_memory": configuration.cache_in_memory and not local,
        "directory": str(CHECKOUT) if local else None,
        "image": None if local else configuration.image,
        "repository": configuration.repository,
        "revision": configuration.revision,
    }
    found = {
        "startup-script": startup_script(),
        "shutdown-script": shutdown_script(),
        LAUNCH: json.dumps(launch),
        "enable-guest-attributes": "TRUE",
    }
    if configuration.devices_per_host:
        found["simulated-devices-per-host"] = str(configuration.devices_per_host)
    return found
