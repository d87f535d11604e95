"""A full, read-only or closed disk is told with its remedy, and nothing half-written stays behind."""

import errno
import os
from pathlib import Path

import pytest

from tasks.storage import StorageError, check_writable, free_bytes, make_directory, storage_errors


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "bytes are free"), (errno.EROFS, "another directory with --root"), (errno.EACCES, "another directory")],
)
def test_storage_errors_have_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=words) as raised:
        check_writable(tmp_path / "root")
    assert raised.value.errno == number
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken") as raised:
        check_writable(tmp_path)
    assert not isinstance(raised.value, StorageError)


def test_check_writable_leaves_nothing_behind(tmp_path: Path):
    check_writable(tmp_path / "new" / "root")
    assert list((tmp_path / "new" / "root").iterdir()) == []


def test_errors_of_other_places_can_be_left_alone(tmp_path: Path):
    with pytest.raises(PermissionError, match="mine"), storage_errors(tmp_path, only_full=True):
        raise PermissionError(errno.EACCES, "Permission denied", "mine")
    with pytest.raises(StorageError, match="bytes are free"), storage_errors(tmp_path, only_full=True):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_directories_are_made_with_their_parents_and_may_exist(tmp_path: Path):
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_free_bytes_of_a_place_that_does_not_exist_yet(tmp_path: Path):
    assert free_bytes(tmp_path / "not" / "yet") > 0
