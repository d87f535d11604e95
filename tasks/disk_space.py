"""Whether the disk has room for what a run writes."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.places import Place, working_directory


def existing_place(root: Path) -> Path:
    """The root itself or, before it is there, the place it will be made in: a plan leaves nothing behind."""
    return next(path for path in (root, *root.parents) if path.exists())


def check_space(root: Place, checkpoints: int, fetch: int, tokens: int, *, refuse: bool) -> list[str]:
    """Warns where checkpoints, source files and tokens may not fit; `refuse`: raises ValueError where the first two do not."""
    needed, free = checkpoints + fetch + tokens, shutil.disk_usage(existing_place(working_directory(root))).free
    message = (
        f"{_disk_of(root)} has {free:,} bytes free, this run needs about {needed:,}: {checkpoints:,} for checkpoints, {fetch:,} for "
        f"source files, {tokens:,} for tokens; free some space, choose another --root, or set train.max_checkpoints lower"
    )
    if refuse and free < checkpoints + fetch:
        raise ValueError(message)
    # how many tokens there will be is only estimated
    return [message] if free < needed else []


def _disk_of(root: Place) -> str:
    return f"--root={root}" if isinstance(root, Path) else f"{working_directory(root)}, where the files of --root={root} are worked on,"
