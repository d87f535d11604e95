"""What a child process names as its error reaches its parent as what it is: a full disk as one, a mistake as one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tasks.children import ChildFailed, run_child

MODULE = """
import sys
from model.child import emit_error
emit_error({error})
sys.exit(1)
"""


def child_that_says(error: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a child that ends with `error`, an expression."""
    (place / "naming_child.py").write_text(MODULE.format(error=error), encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))
    run_child("naming_child", [], lambda _: None)


@pytest.mark.parametrize(
    ("error", "number", "words"),
    [
        ("OSError(28, 'No space left on device')", errno.ENOSPC, "No space left on device"),
        ("OSError(28, 'No space left on device', '/a/b')", errno.ENOSPC, "No space left on device: /a/b"),
        ("OSError(30, 'Read-only file system', '/a/b')", errno.EROFS, "Read-only file system: /a/b"),
        # what TensorStore raises
        (
            "ValueError('RESOURCE_EXHAUSTED: Failed to write [OS error 28: ENOSPC No space left on device]')",
            errno.ENOSPC,
            "RESOURCE_EXHAUSTED",
        ),
    ],
)
def test_a_disk_that_is_full_or_closed_is_an_error_of_the_system(
    error: str, number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=words) as raised:
        child_that_says(error, tmp_path, monkeypatch)
    assert raised.value.errno == number
    assert not str(raised.value.strerror).startswith("[Errno")


@pytest.mark.parametrize(
    "error", ["ValueError('train.x=1: choose 2')", "FileNotFoundError(2, 'No such file', 'x')", "OSError('checkpoint 5 is gone')"]
)
def test_any_other_error_is_named_by_the_child(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildFailed) as raised:
        child_that_says(error, tmp_path, monkeypatch)
    assert raised.value.named
    assert str(raised.value) in ("train.x=1: choose 2", "No such file: x", "checkpoint 5 is gone")


def test_an_error_that_nobody_foresaw_is_told_and_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildFailed, match="connection reset") as raised:
        child_that_says("RuntimeError('connection reset'), foreseen=False", tmp_path, monkeypatch)
    assert not raised.value.named
