"""Where a trained model lies: a run's directory, one of its checkpoints, or a Hugging Face directory. Free of JAX."""

from __future__ import annotations

import hashlib
from pathlib import Path

from model.checkpoint_files import HASHES, steps_in
from model.durable import sha256_of

HF_CONFIG_FILE = "config.json"
# The files of a Hugging Face directory that a model and its tokenizer are read from.
_HF_FILES = ("*.safetensors", "*.index.json", "tokenizer*")


def is_hf(place: Path) -> bool:
    """Whether a directory is a Hugging Face one."""
    return (place / HF_CONFIG_FILE).is_file()


def find_model(path: Path | str) -> Path:
    """The Hugging Face directory or `checkpoints/<step>` that `path` stands for: itself or, of a run's directory, the newest step.

    Raises:
        ValueError: there is none.
    """
    place = Path(path).expanduser().absolute()
    if is_hf(place):
        return place
    steps = steps_in(place / "checkpoints") if (place / "checkpoints").is_dir() else []
    found = place / "checkpoints" / str(steps[0]) if steps else place
    if (found / HASHES).is_file():  # that they are right is checked when it is read
        return found
    raise ValueError(
        f"{path} holds no model: give a run's directory (artifacts/checkpoints/NAME-...), one of its checkpoints/<step>, or a "
        f"directory with a Hugging Face {HF_CONFIG_FILE}" + ("" if place.is_dir() else "; it does not exist")
    )


def model_digest(place: Path) -> str:
    """sha256, hexadecimal, of what `find_model` found; of a checkpoint, of the hashes that were written with it.

    Raises:
        OSError: a file cannot be read.
    """
    if not is_hf(place):
        return sha256_of(place / HASHES)
    files = sorted({place / HF_CONFIG_FILE, *(file for pattern in _HF_FILES for file in place.glob(pattern))})
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()
