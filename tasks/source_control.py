"""The state of the code that a run is started from: git's commit and what differs from it, bounded and without secrets."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from model.secret_text import without_secrets

CHECKOUT = Path(__file__).resolve().parent.parent
LONGEST_DIFF = 200_000  # characters; more is a commit that was not made
MOST_FILES = 200
GIT_SECONDS = 20.0


def code_state(directory: Path = CHECKOUT) -> dict[str, Any]:
    """`{"commit", "dirty", "diff", "diff_cut", "untracked"}` of the checkout that `directory` is in.

    The diff is that of tracked files against the commit, at most `LONGEST_DIFF` characters, `diff_cut` telling whether some were
    left out; of untracked files there are the names alone. `{"commit": None, "why": ...}` where there is no git or no checkout.
    """
    try:
        commit = _git(directory, "rev-parse", "HEAD").strip()
        diff = without_secrets(_git(directory, "diff", "HEAD", "--no-ext-diff", "--no-color"))
        untracked = _git(directory, "ls-files", "--others", "--exclude-standard", "-z").split("\0")[:-1]
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return {"commit": None, "why": without_secrets(said.strip()[:300])}
    return {
        "commit": commit,
        "dirty": bool(diff or untracked),
        "diff": diff[:LONGEST_DIFF],
        "diff_cut": len(diff) > LONGEST_DIFF,
        "untracked": untracked[:MOST_FILES],
    }


def _git(directory: Path, *arguments: str) -> str:
    program = shutil.which("git")
    if program is None:
        raise FileNotFoundError("git is not installed")
    command = [program, "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, timeout=GIT_SECONDS, encoding="utf-8", errors="replace")
    return done.stdout
