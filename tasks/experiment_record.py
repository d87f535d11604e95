"""The record of an experiment, `{root}/experiments/{name}-{fingerprint[:16]}.json`, written before anything of it is launched.

It says from which code and configuration the run was started, what its steps are, what was planned, and where it can be watched.
A run that is started again keeps its record: each start adds a line to `launches`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from typing import TYPE_CHECKING, Any

from model.secret_text import without_secrets
from model.tracker_services import tracker_name
from tasks.json_files import read_json, write_json
from tasks.pipeline import label
from tasks.places import Place, place_of
from tasks.plan_text import plan_lines
from tasks.planning import Plan
from tasks.source_control import code_state
from tasks.steps import Step

if TYPE_CHECKING:
    from model.preflight.result import Preflight

EXPERIMENTS = "experiments"
MOST_LAUNCHES = 100
SCHEMA = 1


def training_step(plan: Plan) -> Step | None:
    """The training of a plan; None where the steps that were asked for do not train."""
    return next((step for step in plan.wanted if step.kind == "checkpoints"), None)


def record_place(training: Place) -> Place:
    """Where the record of the run in the directory `training`, `{root}/checkpoints/{name}-{fingerprint[:16]}`, lies."""
    return training.parent.parent / EXPERIMENTS / f"{training.name}.json"


def read_record(training: str | Place) -> dict[str, Any] | None:
    """The record of the run in that directory; None where there is none. Raises ValueError where it is damaged, or StorageError."""
    return read_json(record_place(place_of(training)))


def write_record(training: Place, record: dict[str, Any]) -> Place:
    """Writes the record of the run in the directory `training`, whole or not at all; where it lies. Raises StorageError."""
    place = record_place(training)
    write_json(place, record)
    return place


def launch_record(
    plan: Plan, description: str, flow_run: dict[str, str], found: Preflight | None = None
) -> tuple[Place, dict[str, Any]] | None:
    """Writes down that the run of a plan is about to start; the record and its place. None where the plan trains nothing.

    A run that is there and only taken up again is as it was recorded: then the record stays as it is.

    Args:
        description: what the experiment is for, in a person's words.
        found: what preflight says of the slice, where the run asks for one.
        flow_run: `id`, `name` and, where there is a UI, `url` of the flow run that starts it.

    Raises:
        StorageError: the root cannot be written.
    """
    step = training_step(plan)
    if step is None:
        return None
    training = step.directory(plan.root)
    try:
        earlier = read_record(training)
    except ValueError:
        earlier = None  # what cannot be read cannot be kept
    if earlier is not None and all(planned.action != "run" for planned in plan.steps if planned.step == step):
        return record_place(training), earlier
    code = code_state()
    launch = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": code["commit"],
        "dirty": code.get("dirty"),
        "flow_run": flow_run,
    }
    launches = [*(earlier or {}).get("launches", []), launch][-MOST_LAUNCHES:]
    record = {**experiment_record(plan, step, description, found), "code": code, "launches": launches}
    return write_record(training, record), record


def experiment_record(plan: Plan, step: Step, description: str, found: Preflight | None = None) -> dict[str, Any]:
    """What is known of an experiment before it runs, as JSON values."""
    config = plan.config
    dump = json.loads(without_secrets(json.dumps(config.model_dump(mode="json"))))
    return {
        "schema": SCHEMA,
        "name": config.name,
        "description": without_secrets(description),
        "run_id": step.fingerprint[:16],
        "tags": list(config.tags),
        "config": dump,
        "vocab_size": plan.model.vocab_size,
        "steps": [
            {
                "step": label(planned.step),
                "fingerprint": planned.step.fingerprint,
                "action": planned.action,
                "why": without_secrets(planned.why),
                "place": str(planned.step.directory(plan.root)),
            }
            for planned in plan.steps
        ],
        "plan": {
            "lines": plan_lines(plan),
            "num_parameters": plan.num_parameters,
            "origin": dataclasses.asdict(plan.origin),
            "tokens": plan.total_tokens,
            "flops": plan.total_flops,
            "seconds": plan.seconds if found is None or found.hours is None else found.hours * 3600,
            "dollars": None if found is None else found.dollars,
            "components": [{"name": part.name, "tokens": part.tokens, "epochs": part.epochs} for part in plan.components],
        },
        "links": _links(plan, step),
    }


def _links(plan: Plan, step: Step) -> dict[str, str]:
    """Where the run can be watched. W&B gives a run its place when it begins; its id is known now."""
    links = {"artifacts": str(step.directory(plan.root))}
    if "wandb" in plan.config.track:
        base = os.environ.get("WANDB_BASE_URL", "https://wandb.ai").rstrip("/")
        project, entity = os.environ.get("WANDB_PROJECT", "prefect-llama"), os.environ.get("WANDB_ENTITY")
        run = f"{project}/runs/{step.fingerprint[:16]}"
        links["wandb"] = f"{base}/{entity}/{run}" if entity else f"{run} ({tracker_name(plan.config.name)})"
    return links


def record_markdown(place: Place, record: dict[str, Any]) -> str:
    """The record as a page of the Prefect UI."""
    code, links = record["code"], {**record["links"]}
    launch = record["launches"][-1]
    if url := launch["flow_run"].get("url"):
        links["flow run"] = url
    state = f"`{code['commit']}`" if code["commit"] else f"not known: {code.get('why')}"
    steps = "\n".join(f"| {each['step']} | `{each['fingerprint'][:16]}` | {each['action']} |" for each in record["steps"])
    changed = "\n".join(f"- untracked: `{name}`" for name in code.get("untracked", ()))
    diff = f"\n\n```diff\n{code['diff'][:20_000]}\n```" if code.get("diff") else ""
    return (
        f"# {record['name']}\n\n{record['description']}\n\n"
        f"- run id: `{record['run_id']}`\n- record: `{place}`\n- commit: {state}{', with changes' if code.get('dirty') else ''}\n"
        + "\n".join(f"- {name}: {link}" for name, link in links.items())
        + f"\n\n| step | fingerprint | action |\n|---|---|---|\n{steps}\n\n## Configuration\n\n```json\n"
        + json.dumps(record["config"], indent=1)
        + f"\n```\n\n## Code\n\n{changed}{diff}\n"
    )
