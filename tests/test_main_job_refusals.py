"""The whole main job on hostile text and on disks that are read-only or full: one clear message, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.main_job import CHECKOUT, MainJob, assert_same_outcome, checkpoint_directory

HAMLET = CHECKOUT / "tasks" / "corpus" / "shakespeare" / "plays" / "hamlet.txt"
ROOM = 24 << 20  # bytes beside the data: the checkpoints of the small run need 8 MB


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


def write(path: Path, content: bytes, repeat: int = 1) -> Path:
    with path.open("wb") as file:
        for _ in range(repeat):
            file.write(content)
    return path


def refused(job: MainJob, *words: str) -> str:
    """Waits for the end; the one message of a job that must refuse, with all of `words` in it."""
    status = job.status()
    messages = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert status in (1, 2), job.output
    assert "Traceback" not in job.output
    assert len(messages) == 1, job.output
    for word in words:
        assert word in messages[0]
    return messages[0]


@pytest.mark.parametrize(("content", "words"), [(b"", "all empty"), (None, "matches no file")])
def test_text_that_is_not_there_is_refused_before_anything_starts(content: bytes | None, words: str, home: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    if content is not None:
        text.write_bytes(content)
    job = MainJob(tmp_path / "root", home, "--text", str(text))
    refused(job, words, str(text), "correct the pattern" if content is None else "point source at text")
    assert job.process.returncode == 2
    assert not (tmp_path / "root").exists()


@pytest.mark.slow
def test_undecodable_bytes_are_named_by_file_line_and_byte(home: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "mine.txt", b"some good text\n\n" * 3000 + b"caf\xe9 au lait\n")
    refused(
        MainJob(tmp_path / "root", home, "--text", str(text)), "mine.txt line 6001 (byte 48003)", "0xe9 is not UTF-8", "convert the file"
    )


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_refused_in_bounded_memory(home: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "mine.txt", b"word " * 200_000, repeat=100)
    job = MainJob(tmp_path / "root", home, "--text", str(text))
    assert job.peak_memory() < 500 << 20
    refused(
        job, "mine.txt line 1 (byte 0)", "a document of 100,000,000 bytes, the limit is 16,777,216", "split it, or raise max_document_bytes"
    )


@pytest.mark.slow
def test_a_text_shorter_than_one_window_is_refused(home: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "mine.txt", b"To be, or not to be, that is the question.\n")
    small_vocabulary = ("--data.tokenizer.vocab-size", "300")
    job = MainJob(tmp_path / "root", home, "--text", str(text), *small_vocabulary)
    refused(job, "component 'text' has 15 training tokens, fewer than one window of seq_len + 1 = 65", "lower seq_len to 14 or less")
    refused(MainJob(tmp_path / "root-2", home, "--text", str(text)), "vocab_size=2048", "set it to 323 or less, or add text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "vocabulary"),
    [(b"one line of text after another\n" * 33_000, 300), (HAMLET.read_bytes().replace(b"thee", b"t\0e"), 1000)],
    ids=["one line again and again", "NUL bytes"],
)
def test_odd_text_is_trained_on(content: bytes, vocabulary: int, home: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "mine.txt", content)
    skipping = ("--reading.on-bad-document", "skip")
    MainJob(tmp_path / "root", home, "--text", str(text), *skipping, "--data.tokenizer.vocab-size", str(vocabulary)).succeed()
    assert (checkpoint_directory(tmp_path / "root") / "hf" / "model.safetensors").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no file system for us: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the room that is left, against others who take some of it at the same moment."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        size = 0
        while free := shutil.disk_usage(disk).free:
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), size, free)
                size += free
    return ballast


def test_a_read_only_disk_is_refused_before_anything_starts(disk: Path, home: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    job = MainJob(disk / "root", home, logs=tmp_path)
    refused(job, str(disk), "Read-only file system", "choose another directory with --root")
    assert job.process.returncode == 2


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_anything_starts(disk: Path, home: Path, tmp_path: Path) -> None:
    ballast = fill(disk)
    os.truncate(ballast, ballast.stat().st_size - (1 << 20))
    refused(
        MainJob(disk, home, logs=tmp_path),
        "bytes free, this run needs about",
        "for checkpoints",
        "free some space",
        "set train.max_checkpoints lower",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    root = tmp_path_factory.mktemp("finished") / "root"
    MainJob(root, home).succeed()
    return root


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_tokenizes(disk: Path, finished: Path, home: Path, tmp_path: Path) -> None:
    root = disk
    job = MainJob(root, home, logs=tmp_path)
    job.until("tokens plays runs")
    ballast = fill(disk)
    refused(job, "bytes are free", "Free some space or choose another --root, then run the same command again")
    ballast.unlink()
    MainJob(root, home, logs=tmp_path).succeed()
    assert_same_outcome(root, finished)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_saves_keeps_the_checkpoints_before(disk: Path, finished: Path, home: Path, tmp_path: Path) -> None:
    root = disk
    for kind in ("raw", "tokenizers", "tokens", "mixtures"):
        shutil.copytree(finished / kind, root / kind)
    job = MainJob(root, home, logs=tmp_path)
    job.until("checkpoints job runs")
    checkpoints = checkpoint_directory(root) / "checkpoints"
    deadline = time.monotonic() + 100
    while not (saved := [path for path in checkpoints.glob("*") if path.name.isdigit()]):
        assert time.monotonic() < deadline, job.output
        time.sleep(0.005)
    ballast = fill(disk)
    refused(job, "bytes are free", "Free some space or choose another --root, then run the same command again")
    assert all(path.is_dir() for path in saved)
    ballast.unlink()
    assert "resuming from the checkpoint of step" in MainJob(root, home, logs=tmp_path).succeed()
    assert_same_outcome(root, finished)
