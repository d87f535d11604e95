"""Makes the automations of `automations.yaml` on a Prefect server, and brings those that are there up to date: as often as one likes.

    python -m deployments.automations                                   # silent runs crash, crashed control flows start again
    python -m deployments.automations --notify slack-webhook/team       # and that block is told when training ends badly

`prefect automation create --from-file` makes the same ones, and makes them again each time it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
import yaml

from tasks.findings import Finding

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

RULES = Path(__file__).with_name("automations.yaml")
NOTIFICATIONS = Path(__file__).with_name("notifications.yaml")


@dataclass(frozen=True)
class Options:
    """Flags of the command."""

    notify: str | None = None
    """Notification block to tell when training fails, crashes or gives up, as `prefect block ls` names it: TYPE/NAME."""
    rules: Path = RULES
    """The automations to make."""


def read_rules(file: Path) -> list[dict[str, Any]]:
    """The automations that a file declares, as the API takes them."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))["automations"]


def notification_rules(client: SyncPrefectClient, block: str) -> list[dict[str, Any]]:
    """The automations that tell the notification block `TYPE/NAME`.

    Raises:
        ValueError: there is no such block, or it is none that notifies.
    """
    identity = _notification_block(client, block)
    rules = read_rules(NOTIFICATIONS)
    for rule in rules:
        rule["actions"] = [{**action, "block_document_id": str(identity)} for action in rule["actions"]]
    return rules


def _notification_block(client: SyncPrefectClient, block: str) -> UUID:
    from prefect.exceptions import ObjectNotFound

    kind, _, name = block.partition("/")
    try:
        found = client.read_block_document_by_name(name, kind, include_secrets=False)
    except ObjectNotFound:
        raise ValueError(f"--notify={block}: no such block on this server: `prefect block ls` lists them, the UI makes one") from None
    if "notify" not in (found.block_schema.capabilities if found.block_schema else ()):
        raise ValueError(f"--notify={block}: a block of type {kind} notifies nobody: name one of type slack-webhook, custom-webhook, ...")
    return found.id


def make(client: SyncPrefectClient, rule: dict[str, Any]) -> str:
    """Makes one automation or brings the one of its name up to date; whether it is switched on stays as it is. What was done, in words."""
    from prefect.events.schemas.automations import AutomationCore

    found = client.read_automations_by_name(rule["name"])
    if not found:
        client.create_automation(AutomationCore.model_validate(rule))
        return "made"
    first, *others = found
    client.update_automation(first.id, AutomationCore.model_validate({**rule, "enabled": first.enabled}))
    for each in others:
        client.delete_automation(each.id)
    return f"up to date, and {len(others)} more of that name deleted" if others else "up to date"


def findings(client: SyncPrefectClient) -> Iterator[Finding]:
    """Whether the automations that runs depend on are there, once each, and switched on."""
    for rule in read_rules(RULES):
        found = client.read_automations_by_name(rule["name"])
        if len(found) == 1 and found[0].enabled:
            yield Finding("automation", "ok", f"{rule['name']!r} is there")
        elif len(found) == 1:
            yield Finding("automation", "warn", f"{rule['name']!r} is switched off", f"`prefect automation resume {rule['name']!r}`")
        else:
            how = "is not there" if not found else f"is there {len(found)} times"
            yield Finding("automation", "warn", f"{rule['name']!r} {how}", "`python -m deployments.automations`")


def main() -> int:
    """The command; its exit status."""
    from prefect.client.orchestration import get_client

    options = tyro.cli(
        Options, prog="python -m deployments.automations", description="Make the automations of this project, or update them."
    )
    try:
        with get_client(sync_client=True) as client:
            told = notification_rules(client, options.notify) if options.notify else []
            for rule in [*read_rules(options.rules), *told]:
                print(f"{rule['name']}: {make(client, rule)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
