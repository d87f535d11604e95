"""What a run starts from, when that is not fresh: found, verified and identified by content before anything is planned on it."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from model.buckets import absolute, in_bucket, path_of
from model.checkpoint_files import HASHES, find_checkpoint
from model.train_config import SimpleTrainConfig
from tasks.fingerprints import fingerprint
from tasks.manifests import digest_once

HF_CONFIG = "config.json"


def pin_initial_weights(train: SimpleTrainConfig) -> tuple[SimpleTrainConfig, str | None]:
    """`train` with the very checkpoint that its path names now, and a digest of the weights; as it is, and None, where they are fresh.

    Raises:
        ValueError: there is nothing there, or it is damaged.
    """
    if train.initialize_from_checkpoint_path is not None:
        path = absolute(path_of(train.initialize_from_checkpoint_path))
        found = find_checkpoint(path) if in_bucket(path) else _verified(path, _changed(path))
        digest = hashlib.sha256((found / HASHES).read_bytes()).hexdigest()
        return train.model_copy(update={"initialize_from_checkpoint_path": str(found)}), digest
    if train.initialize_from_hf is not None:
        directory = Path(train.initialize_from_hf).expanduser().absolute()
        return train.model_copy(update={"initialize_from_hf": str(directory)}), _hf_digest(directory)
    return train, None


def _changed(path: Path) -> tuple[int, ...]:
    return tuple(place.stat().st_mtime_ns for place in (path, path / "checkpoints") if place.exists())


@functools.lru_cache
def _verified(path: Path, changed: tuple[int, ...]) -> Path:
    """The checkpoint that `path` names, whose bytes are read once in a process for as long as no step is added or removed."""
    return find_checkpoint(path)


def _hf_digest(directory: Path) -> str:
    files = [directory / HF_CONFIG, *sorted(directory.glob("*.safetensors"))]
    if len(files) == 1 or not files[0].is_file():
        raise ValueError(
            f"train.initialize_from_hf={str(directory)!r} has no {HF_CONFIG} with *.safetensors beside it: give the directory of a model, "
            f"for one on the hub after `hf download ORGANISATION/NAME --local-dir {directory}`"
        )
    return fingerprint({path.name: digest_once(path) for path in files})
