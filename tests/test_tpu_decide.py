"""What the tpu worker decides: single rules, and invariants over every combination of states."""

from __future__ import annotations

import datetime
import itertools
from dataclasses import replace
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.states import Crashed

from deployments.tpu import decide as policy
from deployments.tpu.decide import FINAL, RETRIES, Action, Change, Limits, RunSeen, SliceSeen, decide, missing
from deployments.tpu.host_agent import REFUSED
from model.child import STOPPED
from tasks import pool_training

NAME = "pl-run-2"
SLICE = SliceSeen(NAME, "ACTIVE")
RUNNING = RunSeen("RUNNING", "Running", NAME, started=True, settled_seconds=600)
PENDING = RunSeen("PENDING", "Pending", NAME)
LIMITS = Limits(max_preemptions=2, max_failures=1, num_zones=2, max_wait_seconds=3600, max_active_seconds=7200)


def run(type_: str, **changed: object) -> RunSeen:
    return replace(RUNNING, type=type_, name=type_.title(), **changed)


@pytest.mark.parametrize(
    ("seen", "of", "delete", "change"),
    [
        # waiting is shown, under a name of its own, once
        (replace(SLICE, state="ACCEPTED"), PENDING, False, Change.WAIT),
        (replace(SLICE, state="PROVISIONING"), replace(PENDING, name="WaitingForTPU"), False, Change.WAIT),
        (replace(SLICE, state="WAITING_FOR_RESOURCES"), replace(PENDING, name="WaitingForTPU"), False, None),
        # nothing is wrong
        (SLICE, RUNNING, False, None),
        (SLICE, PENDING, False, None),
        (replace(SLICE, exit_codes={1: 0}), RUNNING, False, None),
        (replace(SLICE, exit_codes={1: STOPPED}), RUNNING, False, None),
        (replace(SLICE, exit_codes={0: STOPPED}), RUNNING, False, None),
        (replace(SLICE, exit_codes={0: 143}), RUNNING, False, None),
        (replace(SLICE, exit_codes={0: 143, 1: STOPPED}, halted_seconds=301), RUNNING, True, Change.HOST_FAILED),
        # preemption: only when no host can write any more, and not against the failures
        (replace(SLICE, state="SUSPENDING"), RUNNING, False, None),
        (replace(SLICE, state="SUSPENDED"), RUNNING, True, Change.PREEMPTED),
        (replace(SLICE, state="SUSPENDED"), replace(RUNNING, failures=9), True, Change.PREEMPTED),
        (replace(SLICE, state="SUSPENDED"), replace(RUNNING, preemptions=2), True, Change.GAVE_UP),
        (replace(SLICE, state="SUSPENDED"), PENDING, True, Change.PREEMPTED),
        (replace(SLICE, lost_nodes=("pl-run-2-1",)), RUNNING, True, Change.PREEMPTED),
        # hosts
        (replace(SLICE, exit_codes={1: 1}), RUNNING, True, Change.HOST_FAILED),
        (replace(SLICE, exit_codes={1: 137}), replace(RUNNING, failures=1), True, Change.GAVE_UP),
        (replace(SLICE, exit_codes={0: 0}), RUNNING, True, Change.HOST_FAILED),
        (replace(SLICE, exit_codes={0: None, 1: 1}), RUNNING, False, None),
        (replace(SLICE, exit_codes={1: None}, halted_seconds=301), RUNNING, True, Change.HOST_FAILED),
        (replace(SLICE, active_seconds=1801), PENDING, True, Change.HOST_FAILED),
        (replace(SLICE, exit_codes={0: REFUSED}), PENDING, True, Change.GAVE_UP),
        # requests that Cloud TPU does not fulfil
        (replace(SLICE, state="PROVISIONING", age_seconds=3601), PENDING, False, Change.WAIT),
        (replace(SLICE, state="PROVISIONING", age_seconds=7201), PENDING, True, Change.NEXT_ZONE),
        (replace(SLICE, state="FAILED"), PENDING, True, Change.NEXT_ZONE),
        (replace(SLICE, state="FAILED"), replace(PENDING, zones_tried=2), True, Change.GAVE_UP),
        (replace(SLICE, state="FAILED"), RUNNING, True, Change.HOST_FAILED),
        (replace(SLICE, state="WAITING_FOR_RESOURCES", age_seconds=3601), PENDING, True, Change.NEXT_ZONE),
        # money
        (replace(SLICE, active_seconds=7201), RUNNING, True, Change.GAVE_UP),
        (replace(SLICE, active_seconds=3601), replace(RUNNING, spent_seconds=3600), True, Change.GAVE_UP),
        (replace(SLICE, active_seconds=3599), replace(RUNNING, spent_seconds=3600), False, None),
        # cancelling
        (replace(SLICE, state="ACCEPTED"), run("CANCELLING", started=False), True, Change.CANCELLED),
        (SLICE, run("CANCELLING", settled_seconds=5), False, None),
        (SLICE, run("CANCELLING", settled_seconds=61), True, Change.CANCELLED),
        (replace(SLICE, exit_codes={0: 0}), run("CANCELLING", settled_seconds=5), True, Change.CANCELLED),
        (replace(SLICE, state="SUSPENDED"), run("CANCELLING", settled_seconds=5), True, Change.CANCELLED),
        # the end
        (SLICE, run("COMPLETED", settled_seconds=5), False, None),
        (SLICE, run("COMPLETED", settled_seconds=61), True, None),
        (replace(SLICE, exit_codes={0: 0}), run("COMPLETED", settled_seconds=5), True, None),
        (SLICE, run("FAILED"), True, None),
        (SLICE, run("CRASHED", settled_seconds=5), True, Change.HOST_FAILED),
        (SLICE, run("CRASHED", settled_seconds=31), False, None),
        (SLICE, run("CRASHED", settled_seconds=5, age_seconds=119), True, Change.HOST_FAILED),
        (SLICE, run("CRASHED", settled_seconds=5, age_seconds=121), False, None),
        (SLICE, run("CRASHED", settled_seconds=61), True, None),
        (replace(SLICE, state="SUSPENDING"), run("CRASHED", settled_seconds=5), True, Change.PREEMPTED),
        (SLICE, run("CRASHED", settled_seconds=5, failures=1), False, Change.GAVE_UP),
        (SLICE, run("CRASHED", settled_seconds=31, failures=1), False, None),
        (replace(SLICE, active_seconds=7201), run("CRASHED", settled_seconds=5), False, Change.GAVE_UP),
        (SLICE, replace(RUNNING, type="CRASHED", name="GaveUp", settled_seconds=5), False, None),
        # slices that nobody needs
        (SLICE, None, True, None),
        (SLICE, run("SCHEDULED"), True, None),
        (SLICE, replace(RUNNING, newest_slice="pl-run-3"), True, None),
        (replace(SLICE, state="DELETING"), RUNNING, False, None),
    ],
)
def test_rules(seen: SliceSeen, of: RunSeen | None, delete: bool, change: Change | None) -> None:
    action = decide(seen, of, LIMITS)
    assert (action.delete, action.change) == (delete, change), action
    assert action.why or action == Action()


def test_what_a_host_said_is_in_the_reason() -> None:
    said = replace(SLICE, message="host 0: cannot read the secret S")
    for code, of in ((REFUSED, PENDING), (1, PENDING), (1, RUNNING)):
        assert "cannot read the secret S" in decide(replace(said, exit_codes={0: code}), of, LIMITS).why
    assert "cannot read the secret S" in decide(replace(said, exit_codes={1: 1}), RUNNING, LIMITS).why


STATES = ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED", "FAILED", "DELETING"]
CODES: list[dict[int, int | None]] = [{}, {0: 0}, {0: 1}, {1: 1}, {1: STOPPED}, {1: None}]
TYPES = ["PENDING", "RUNNING", "CANCELLING", "SCHEDULED", "PAUSED", *sorted(FINAL)]
EVERYTHING = [
    (
        SliceSeen(NAME, state, codes, lost, age, age, halted),
        RunSeen(type_, name, newest, started, settled, *used),
    )
    for state, codes, lost, age, halted in itertools.product(STATES, CODES, [(), ("n",)], [0, 1e5], [0, 1e3])
    for type_, name, newest, started, settled, used in itertools.product(
        TYPES, ["Running", "GaveUp"], [NAME, "pl-run-3"], [True, False], [1, 100], [(0, 0, 1), (2, 0, 2), (0, 1, 1), (2, 1, 2)]
    )
]


def test_every_combination_keeps_the_promises() -> None:
    for seen, of in EVERYTHING:
        action = decide(seen, of, LIMITS)
        case = (seen, of, action)
        final = of.type in FINAL
        if action.change in RETRIES:
            assert action.delete, case  # a new slice never trains beside the old one
            assert seen.state != "SUSPENDING" or of.type == "CRASHED", case  # its hosts may still be saving
            assert of.newest_slice == NAME, case
        if action.change is Change.PREEMPTED:
            assert of.preemptions < LIMITS.max_preemptions, case
        if action.change is Change.HOST_FAILED:
            assert of.failures < LIMITS.max_failures, case
        if action.change is Change.NEXT_ZONE:
            assert of.zones_tried < LIMITS.num_zones, case
        if action.change is Change.CANCELLED:
            assert of.type == "CANCELLING", case
        if final and action.change is not None:
            assert of.type == "CRASHED", case
            assert action.change in (Change.HOST_FAILED, Change.PREEMPTED, Change.GAVE_UP), case
            assert of.name != Change.GAVE_UP.value, case
        if (final and of.settled_seconds > 60) or of.newest_slice != NAME or of.type == "SCHEDULED":
            assert action.delete or seen.state == "DELETING", case  # nothing is paid for that nobody needs
        if action.delete and of.type == "RUNNING" and of.newest_slice == NAME:
            assert action.change is not None, case  # a run never loses its slice without a word
        if action.change is Change.WAIT:
            assert (of.type, action.delete) == ("PENDING", False), case


def test_a_run_whose_slice_is_gone() -> None:
    shown = replace(PENDING, name="WaitingForTPU")
    assert missing(RUNNING, LIMITS).change is Change.HOST_FAILED
    assert missing(shown, LIMITS).change is Change.HOST_FAILED
    assert missing(replace(RUNNING, failures=1), LIMITS).change is Change.GAVE_UP
    assert missing(run("CANCELLING"), LIMITS).change is Change.CANCELLED
    assert missing(PENDING, LIMITS).change is Change.RESUBMITTED  # its worker died before it asked for one
    assert missing(run("COMPLETED"), LIMITS) == Action()
    assert not any(missing(each, LIMITS).delete for each in (RUNNING, shown, PENDING))


def test_whoever_waits_for_a_run_waits_longer_than_it_may_be_tried_again() -> None:
    assert pool_training.CRASH_SECONDS > policy.RETRY_AGE_SECONDS + 10
    assert Change.GAVE_UP.value == pool_training.GAVE_UP
    assert pool_training.CANCEL_SECONDS > policy.CANCEL_SECONDS


@pytest.mark.parametrize("ahead", [-600, 0, 600])  # seconds of the server's clock before this machine's
def test_whoever_waits_goes_by_the_clock_that_workers_go_by(ahead: int) -> None:
    there = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
    answers = [httpx.Response(status, headers={"Date": format_datetime(there, usegmt=True)}) for status in (200, 404)]

    def crashed(ago: float) -> Any:
        return SimpleNamespace(state=Crashed(timestamp=there - datetime.timedelta(seconds=ago)))

    def no_such_page() -> httpx.Response:
        raise httpx.HTTPStatusError("404", request=httpx.Request("GET", "http://x"), response=answers[1])

    for hello in (lambda: answers[0], no_such_page):
        client: Any = SimpleNamespace(hello=hello)
        assert pool_training.may_be_tried_again(client, crashed(policy.RETRY_AGE_SECONDS))
        assert not pool_training.may_be_tried_again(client, crashed(pool_training.CRASH_SECONDS + 5))


def test_while_the_server_is_away_nobody_gives_up_a_crashed_run() -> None:
    def away() -> None:
        raise httpx.ConnectError("away")

    client: Any = SimpleNamespace(hello=away)
    run: Any = SimpleNamespace(state=Crashed())
    assert pool_training.may_be_tried_again(client, run)
    run.state = Crashed(name=Change.GAVE_UP.value)
    assert not pool_training.may_be_tried_again(client, run)
