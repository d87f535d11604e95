"""Steps that run side by side share the one live display that a terminal has room for."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import TextColumn

from tasks import progress
from tasks.progress import SharedDisplay, description_column


def display(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> tuple[SharedDisplay, io.StringIO]:
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=written, force_terminal=terminal, width=80))
    return SharedDisplay(description_column, lambda: TextColumn("loss {task.fields[loss]}")), written


def test_bars_of_several_steps_are_in_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, written = display(monkeypatch, terminal=True)
    first, second = shared.add("train a", 10, 3, loss="2.0"), shared.add("train b", 10, loss="3.0")
    assert first is not None
    assert second is not None
    assert first[0] is second[0]
    assert [task.completed for task in first[0].tasks] == [3, 0]
    shared.remove()  # the other one goes on
    first[0].update(second[1], loss="2.5")
    assert first[0].live.is_started
    shared.remove()
    assert not first[0].live.is_started
    for text in ("train a", "train b", "loss 2.0", "loss 2.5"):
        assert text in written.getvalue()
    again = shared.add("train c", 10, loss="1.0")
    assert again is not None
    assert again[0] is not first[0]
    shared.remove()


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, written = display(monkeypatch, terminal=False)
    assert shared.add("train a", 10, loss="2.0") is None
    assert written.getvalue() == ""
