"""What becomes of one TPU slice and of the flow run it was made for. Pure: what is seen goes in, one action comes out.

The worker keeps no memory of its own. Everything it decides follows from the queued resource (found by its labels), from the
exit codes that its hosts left, and from the flow run, whose past states count the preemptions, failures and zones tried.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from deployments.tpu.host_agent import REFUSED
from model.child import STOPPED

# What the run is called in the UI while Cloud TPU is asked. Prefect takes a second PENDING state only under another name.
WAITING_STATES = {
    "CREATING": "WaitingForTPU",
    "ACCEPTED": "WaitingForTPU",
    "WAITING_FOR_RESOURCES": "WaitingForTPU",
    "PROVISIONING": "ProvisioningTPU",
}
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
LEADER = 0

FINISH_SECONDS = 60.0  # for host 0 to flush its logs after the run is final
CANCEL_SECONDS = 60.0  # for a run that trains to save and stop after it was cancelled
RETRY_SECONDS = 30.0  # a crashed run is tried again this soon after it was seen to be that
RETRY_AGE_SECONDS = 120.0  # and this soon after it crashed, or not at all: whoever waits for it gives up after that
PROVISION_SECONDS = 3600.0  # for capacity that was granted to become a slice
BOOT_SECONDS = 1800.0  # for an active slice's host 0 to start the run: the image is large
HALT_SECONDS = 300.0  # between hosts that were told to shut down and a state of the slice that says why
# How a host ends that is told to shut down: its agent says so (None); or its command alone was told, which saved, or not even that.
HALTED = (None, STOPPED, 128 + signal.SIGTERM)


class Change(Enum):
    """What is proposed for the flow run."""

    WAIT = "wait"  # a PENDING state that shows where the slice is
    PREEMPTED = "Preempted"  # scheduled again, on a new slice; counts against max_preemptions
    HOST_FAILED = "HostFailed"  # scheduled again; counts against max_failures
    NEXT_ZONE = "NextZone"  # scheduled again, in the next zone of the list
    RESUBMITTED = "Resubmitted"  # scheduled again: the worker that took it died before it asked for a slice
    GAVE_UP = "GaveUp"  # crashed for good, by its own name: "Crashed" is what Prefect sets, and may be tried again
    CANCELLED = "Cancelled"


RETRIES = (Change.PREEMPTED, Change.HOST_FAILED, Change.NEXT_ZONE, Change.RESUBMITTED)


@dataclass(frozen=True)
class SliceSeen:
    """A queued resource as Cloud TPU shows it, and what its hosts reported."""

    name: str
    state: str  # of `QueuedResourceState.State`
    exit_codes: Mapping[int, int | None] = field(default_factory=dict)  # by rank; None: told to shut down; absent: it runs
    lost_nodes: tuple[str, ...] = ()  # nodes of an active slice that are gone: part of a multislice was preempted
    age_seconds: float = 0.0  # since it was asked for
    active_seconds: float = 0.0  # since the worker first saw it active: what is paid for
    halted_seconds: float = 0.0  # since the worker first saw a host told to shut down
    message: str = ""  # Cloud TPU's own words, where it failed; else those of hosts that could not run their command


@dataclass(frozen=True)
class RunSeen:
    """The flow run of a slice."""

    type: str  # PENDING RUNNING CANCELLING SCHEDULED PAUSED, or one of FINAL
    name: str = ""
    newest_slice: str = ""  # the last one that was made for it
    started: bool = False  # its code ran since it was last scheduled
    settled_seconds: float = 1e9  # since this worker first saw its state
    preemptions: int = 0
    failures: int = 0
    zones_tried: int = 1
    spent_seconds: float = 0.0  # that earlier slices of the run trained
    message: str = ""  # of its state: what it crashed with
    age_seconds: float = 0.0  # since its state was set, by the server's clock; of a crashed run only


@dataclass(frozen=True)
class Limits:
    """What a run may use up."""

    max_preemptions: int = 100
    max_failures: int = 3
    num_zones: int = 1
    max_wait_seconds: float = 86_400.0  # in one zone's queue
    max_active_seconds: float = float("inf")  # what max_cost buys


@dataclass(frozen=True)
class Action:
    """What to do. `change` None leaves the flow run as it is."""

    delete: bool = False
    change: Change | None = None
    why: str = ""


NOTHING = Action()


def decide(seen: SliceSeen, run: RunSeen | None, limits: Limits) -> Action:
    """What to do with a slice and its flow run now. Doing it twice does no harm."""
    if seen.state == "DELETING":
        return NOTHING
    if run is None:
        return Action(delete=True, why="its flow run was deleted")
    if run.newest_slice and run.newest_slice != seen.name:
        return Action(delete=True, why=f"the run went on to {run.newest_slice}")
    if run.type in FINAL:
        return _after_the_end(seen, run, limits)
    if run.type == "SCHEDULED":
        return Action(delete=True, why=f"the run is {run.name or 'scheduled'} and gets a new slice")
    if run.type == "CANCELLING":
        return _while_cancelling(seen, run)
    return _while_wanted(seen, run, limits)


def missing(run: RunSeen, limits: Limits) -> Action:
    """What to do with a run whose slice is no longer there."""
    if run.type == "CANCELLING":
        return Action(change=Change.CANCELLED, why="cancelled; its slice is gone")
    if run.type not in ("PENDING", "RUNNING"):
        return NOTHING
    if run.type == "PENDING" and run.name not in WAITING_STATES.values():
        return Action(change=Change.RESUBMITTED, why="the worker that took the run is gone and had not asked for a slice")
    return _failed(run, limits, f"the slice {run.newest_slice} was deleted by somebody else", delete=False)


def _after_the_end(seen: SliceSeen, run: RunSeen, limits: Limits) -> Action:
    soon = run.settled_seconds < RETRY_SECONDS and run.age_seconds < RETRY_AGE_SECONDS
    again = run.type == "CRASHED" and run.name != Change.GAVE_UP.value and soon
    if again and (seen.state in ("SUSPENDING", "SUSPENDED") or seen.lost_nodes) and run.preemptions < limits.max_preemptions:
        return _preempted(run, limits, "the run crashed when Cloud TPU took the slice back")
    if again:
        over, why = _over_budget(seen, run, limits), f"the run crashed: {run.message or 'without a reason'}"
        if run.failures < limits.max_failures and not over:
            why = f"{why}; failure {run.failures + 1} of {limits.max_failures}"
            return Action(delete=True, change=Change.HOST_FAILED, why=why)
        # by the name that says it, or who waits for the run would wait on
        return Action(
            change=Change.GAVE_UP, why=f"{why}; " + ("max_cost is spent" if over else f"max_failures={limits.max_failures} is used up")
        )
    if seen.state == "ACTIVE" and LEADER not in seen.exit_codes and run.settled_seconds < FINISH_SECONDS:
        return NOTHING  # host 0 still sends its logs
    return Action(delete=True, why=f"the run is {run.name or run.type}")


def _while_cancelling(seen: SliceSeen, run: RunSeen) -> Action:
    if not run.started:
        return Action(delete=True, change=Change.CANCELLED, why="cancelled while it waited for a TPU")
    if seen.state != "ACTIVE" or LEADER in seen.exit_codes:
        return Action(delete=True, change=Change.CANCELLED, why="cancelled; its hosts have stopped")
    if run.settled_seconds > CANCEL_SECONDS:
        return Action(delete=True, change=Change.CANCELLED, why=f"cancelled; it did not stop within {CANCEL_SECONDS:.0f} s")
    return NOTHING


def _while_wanted(seen: SliceSeen, run: RunSeen, limits: Limits) -> Action:
    if seen.state == "SUSPENDING":
        return NOTHING  # its hosts may still be saving: a second slice beside them would train the same run twice
    if seen.state == "SUSPENDED":
        return _preempted(run, limits, "Cloud TPU took the slice back")
    if seen.lost_nodes:
        return _preempted(run, limits, f"part of the slice is gone: {', '.join(seen.lost_nodes)}")
    if seen.state == "FAILED":
        why = f"Cloud TPU failed the request: {seen.message or 'without a reason'}"
        return _failed(run, limits, why) if run.started else _not_granted(run, limits, why)
    if seen.state in WAITING_STATES:
        granted = seen.state == "PROVISIONING"  # then it was waited for, and comes soon
        if seen.age_seconds > limits.max_wait_seconds + (PROVISION_SECONDS if granted else 0.0):
            return _not_granted(run, limits, f"no TPU after {seen.age_seconds / 60:.0f} minutes in the queue")
        name = WAITING_STATES[seen.state]
        show = run.type == "PENDING" and run.name != name
        return Action(change=Change.WAIT, why=name) if show else NOTHING
    if seen.state == "ACTIVE":
        return _while_active(seen, run, limits)
    return NOTHING


def _while_active(seen: SliceSeen, run: RunSeen, limits: Limits) -> Action:
    if _over_budget(seen, run, limits):
        return Action(
            delete=True, change=Change.GAVE_UP, why=f"max_cost is spent after {(run.spent_seconds + seen.active_seconds) / 3600:.2f} hours"
        )
    halted = [rank for rank, code in sorted(seen.exit_codes.items()) if code in HALTED]
    if halted:  # a preemption, a reboot, or a deletion: the slice's own state will say which
        if seen.halted_seconds > HALT_SECONDS:
            return _failed(run, limits, f"host(s) {halted} shut down and did not come back")
        return NOTHING
    said = f": {seen.message}" if seen.message else ""
    refused = [rank for rank, code in sorted(seen.exit_codes.items()) if code == REFUSED]
    if refused:  # the next slice would meet the same refusal
        return Action(delete=True, change=Change.GAVE_UP, why=f"host(s) {refused} could not begin{said}")
    if LEADER in seen.exit_codes:
        return _failed(run, limits, f"host 0 ended with {seen.exit_codes[LEADER]} and left the run {run.name or run.type}{said}")
    dead = {rank: code for rank, code in seen.exit_codes.items() if code != 0}
    if dead:
        return _failed(run, limits, "ended: " + ", ".join(f"host {rank} with {code}" for rank, code in sorted(dead.items())) + said)
    if run.type == "PENDING" and seen.active_seconds > BOOT_SECONDS:
        return _failed(run, limits, f"the slice is active, and host 0 did not start the run within {BOOT_SECONDS / 60:.0f} minutes")
    return NOTHING


def _over_budget(seen: SliceSeen, run: RunSeen, limits: Limits) -> bool:
    return run.spent_seconds + seen.active_seconds > limits.max_active_seconds


def _preempted(run: RunSeen, limits: Limits, why: str) -> Action:
    if run.preemptions >= limits.max_preemptions:
        return Action(delete=True, change=Change.GAVE_UP, why=f"{why}; max_preemptions={limits.max_preemptions} is used up")
    return Action(delete=True, change=Change.PREEMPTED, why=f"{why}; preemption {run.preemptions + 1} of {limits.max_preemptions}")


def _failed(run: RunSeen, limits: Limits, why: str, *, delete: bool = True) -> Action:
    if run.failures >= limits.max_failures:
        return Action(delete=delete, change=Change.GAVE_UP, why=f"{why}; max_failures={limits.max_failures} is used up")
    return Action(delete=delete, change=Change.HOST_FAILED, why=f"{why}; failure {run.failures + 1} of {limits.max_failures}")


def _not_granted(run: RunSeen, limits: Limits, why: str) -> Action:
    if run.zones_tried >= limits.num_zones:
        zones = "the only zone" if limits.num_zones == 1 else f"all {limits.num_zones} zones"
        return Action(delete=True, change=Change.GAVE_UP, why=f"{why}; that was {zones} given: name more zones, or another slice")
    return Action(delete=True, change=Change.NEXT_ZONE, why=f"{why}; trying zone {run.zones_tried + 1} of {limits.num_zones}")
