"""What a run is asked for while it goes: nothing that was asked is forgotten, and a stop least of all."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from model import partitioning
from model.requests import SAVE_FILE, Request, Requests


@pytest.fixture
def requests(tmp_path: Path) -> Requests:
    return Requests(tmp_path, partitioning.make_mesh(devices=jax.devices()[:1]), minutes_between_saves=None)


def heard(requests: Requests) -> Request:
    requests.hear(requests.say())
    return requests.agreed


def test_a_save_is_over_when_it_is_served_and_a_stop_never(requests: Requests) -> None:
    assert heard(requests) == Request.NOTHING
    requests.ask(Request.SAVE)
    assert heard(requests) == Request.SAVE
    requests.served()
    assert (requests.agreed, heard(requests)) == (Request.NOTHING, Request.NOTHING)
    requests.ask(Request.STOP)
    requests.ask(Request.SAVE)
    assert heard(requests) == Request.STOP
    requests.served()
    assert (requests.agreed, heard(requests)) == (Request.STOP, Request.STOP)


def test_a_stop_that_comes_between_hearing_and_serving_is_heard_next(requests: Requests) -> None:
    requests.ask(Request.SAVE)
    assert heard(requests) == Request.SAVE
    requests.ask(Request.STOP)
    requests.served()
    assert heard(requests) == Request.STOP


def test_the_file_is_looked_for_and_taken_away(requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.requests.LOOK_SECONDS", 0.0)
    (tmp_path / SAVE_FILE).touch()
    assert heard(requests) == Request.SAVE
    requests.served()
    assert not (tmp_path / SAVE_FILE).exists()
    assert heard(requests) == Request.NOTHING
