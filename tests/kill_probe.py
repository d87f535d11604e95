"""Run as a child by test_tokenization: makes one token store again and again, each time killed at another moment.

    python -m tests.kill_probe RUN.pickle DIRECTORY

A process of its own, since it forks, which a process with JAX's threads must not. Prints how many attempts were killed.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import shard_tokenizer
from tasks.tokenization import tokenize_body


def in_fork(work: Callable[[], object]) -> int:
    """Runs `work` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def dying_at(call: int, owner: Any, name: str, work: Callable[[], object]) -> Callable[[], None]:
    """`work` whose `call`-th use of `owner.name` kills the process before it does anything."""
    real, count = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    def killed() -> None:
        setattr(owner, name, counted)
        work()

    return killed


def main(arguments: list[str]) -> None:
    """Kills at random moments, then lets one attempt end."""
    run = pickle.loads(Path(arguments[0]).read_bytes())
    draw = random.Random(0)
    work = lambda: tokenize_body(run.tokens, Path(arguments[1]), run.inputs)  # noqa: E731
    kills = 0
    for owner, name, calls in ((os, "fsync", 30), (os, "replace", 16), (shard_tokenizer, "read_documents", 2), (os, "fsync", 30)):
        for _ in range(3):
            kills += in_fork(dying_at(draw.randint(1, calls), owner, name, work)) == signal.SIGKILL
    assert in_fork(work) == 0
    print(kills)


if __name__ == "__main__":
    main(sys.argv[1:])
