"""The main job as a person starts it: a small `python flows/train.py`, its processes, its output, and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from model.metrics import read_json_lines
from tests.cpu_compiler import xla_flags

CHECKOUT = Path(__file__).resolve().parent.parent
STEPS = 30
SMALL = (
    *("--name", "job", "--train.num-train-steps", str(STEPS), "--train.train-batch-size", "4", "--train.train-seq-len", "64"),
    *("--train.steps-per-export", "5", "--train.steps-per-log", "1", "--train.steps-per-eval", "15", "--train.max-eval-batches", "2"),
    *("--train.steps-per-sample", "15", "--train.sample-tokens", "8", "--model.hidden-dim", "32", "--model.intermediate-dim", "64"),
    *("--model.num-layers", "2", "--model.num-heads", "2", "--model.num-kv-heads", "1"),
)
DEADLINE_SECONDS = 240.0  # a hang, not a slow machine


class MainJob:
    """One run in a process group of its own, as a terminal starts it; standard output and error go to one file."""

    def __init__(
        self,
        root: Path,
        home: Path,
        *arguments: str,
        logs: Path | None = None,
        place: str | None = None,
        script: Path = CHECKOUT / "flows" / "train.py",
        **environment: str,
    ) -> None:
        """`place`: where artifacts lie, if that is not the directory `root`. `script`: another than flows/train.py."""
        self.root = root
        self.log = (logs or root.parent) / f"{root.name}-{time.monotonic_ns()}.log"
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "XLA_"))}
        variables |= {
            "PREFECT_HOME": str(home),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(),
            "NO_COLOR": "1",
            "COLUMNS": "200",
            **environment,
        }
        # The same cores in every run: float sums come out in the same order.
        command = ["taskset", "-c", "0,1", sys.executable, str(script), "--root", place or str(root)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *SMALL, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=self.log.parent,
                start_new_session=True,
                preexec_fn=_as_in_a_terminal,
            )

    @property
    def output(self) -> str:
        """All it has said so far."""
        return self.log.read_text(errors="replace")

    def until(self, text: str) -> None:
        """Waits until it has said `text`."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text not in self.output:
            assert self.process.poll() is None, f"ended with {self.process.returncode} before it said {text!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"did not say {text!r}:\n{self.output}"
            time.sleep(0.02)

    def status(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Waits for the end; the exit status."""
        return self.process.wait(timeout=seconds)

    def peak_memory(self) -> int:
        """Waits for the end; the most bytes that the flow process itself had in memory, looked at every 20 ms."""
        most = 0
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            # of a process that has ended but was not waited for, there is no VmHWM any more
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            most = max([most, *(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))])
            time.sleep(0.02)
        return most

    def succeed(self) -> str:
        """Waits for the end, which must be a good one; all it said."""
        assert self.status() == 0, self.output
        return self.output

    def children(self) -> list[int]:
        """Process ids of everything below it."""
        below: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # ended since it was listed
            below.setdefault(parent, []).append(int(stat.parent.name))
        found: list[int] = []
        left = [self.process.pid]
        while left:
            found += (more := below.get(left.pop(), []))
            left += more
        return found

    def child(self, module: str) -> int | None:
        """Process id of the child that runs `python -m module`, if there is one."""
        for pid in self.children():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if module in words:
                return pid
        return None

    def kill(self, *, tree: bool) -> None:
        """kill -9: of everything at once, or of the flow alone, after which nothing may be left either."""
        below = self.children()
        self.process.kill()
        for pid in below if tree else ():
            _kill(pid)
        self.process.wait()
        assert_gone(below)

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)


def _as_in_a_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background of a script has it ignored


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # ended by itself in between


def assert_gone(pids: list[int]) -> None:
    """Waits until none of the processes runs any more."""
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"outlived the flow: {left}"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def checkpoint_directory(root: Path) -> Path:
    """The one training artifact below `root`."""
    (directory,) = (root / "checkpoints").glob("job-*")
    return directory


def curves(directory: Path) -> dict[str, Any]:
    """What training left in its directory and must not depend on how often it was disturbed: all numbers but times and memory, samples."""
    rows = read_json_lines(directory / "metrics.jsonl")
    measured = ("throughput/", "goodput", "host/", "device/")
    return {
        "metrics": [{key: row[key] for key in row if not key.startswith(measured) and not key.endswith("time")} for row in rows],
        "samples": (directory / "samples.jsonl").read_bytes(),
    }


def outcome(root: Path) -> dict[str, Any]:
    """The curves, and the exported weights."""
    directory = checkpoint_directory(root)
    return {**curves(directory), "weights": (directory / "hf" / "model.safetensors").read_bytes()}


def assert_same_outcome(root: Path, undisturbed: Path) -> None:
    """The outcomes are equal bit for bit."""
    found, expected = outcome(root), outcome(undisturbed)
    assert found["metrics"] == expected["metrics"]
    assert found["samples"] == expected["samples"]
    assert found["weights"] == expected["weights"]
