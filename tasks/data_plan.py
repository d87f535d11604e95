"""What a run reads of each dataset: tokens, epochs, bytes to fetch; measured where the tokens are there, else estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.batches import BatchLoader
from tasks.artifacts import read_manifest
from tasks.config import RunConfig
from tasks.data_steps import DataSteps, Mixing, RawFiles
from tasks.steps import Step

# English text gives 3 to 4.5 bytes a token with the usual vocabularies, code less. Only the order of magnitude is meant.
BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True)
class PlannedComponent:
    """One dataset of a run. `measured` False: its tokens are not there yet, and numbers come from its bytes."""

    name: str
    tokens: float  # read by the run
    available: float | None  # training tokens there are; None: not known
    measured: bool

    @property
    def epochs(self) -> float | None:
        """How often the run reads all of it; None where that is not known."""
        return self.tokens / self.available if self.available else None


def planned_components(config: RunConfig, steps: DataSteps, root: Path) -> tuple[PlannedComponent, ...]:
    """What the run reads of each dataset it trains on.

    Raises ValueError, as the training would, where the committed mixture cannot feed it.
    """
    if steps.mixture.is_committed(root):
        loader = BatchLoader(
            steps.mixture.directory(root),
            seq_len=config.seq_len,
            global_batch_size=config.train.train_batch_size,
            seed=config.train.seed,
        )
        planned = loader.planned(config.train.num_train_steps)
        return tuple(
            PlannedComponent(name, part["tokens"], part["tokens"] / part["epochs"] if part["epochs"] else None, measured=True)
            for name, part in planned.items()
        )
    tokens = _tokens_read(config, steps)
    components: list[PlannedComponent] = []
    for step in steps.tokens:
        if step.name in tokens:
            available, measured = _available(step, root)
            components.append(PlannedComponent(step.name, tokens[step.name], available, measured))
    return tuple(components)


def bytes_to_fetch(steps: DataSteps, root: Path) -> int:
    """Bytes of source files that the run has to copy or download, as far as servers tell or the dataset declares."""
    missing = [step.config for step in steps.downloads if not step.is_committed(root)]
    return sum(_source_bytes(config) or 0 for config in missing if isinstance(config, RawFiles))


def _source_bytes(config: RawFiles) -> int | None:
    sizes = [file.bytes for file in config.files if file.bytes is not None]
    return sum(sizes) if len(sizes) == len(config.files) else config.source_bytes


def _tokens_read(config: RunConfig, steps: DataSteps) -> Mapping[str, float]:
    """Tokens by dataset, from shares and steps alone."""
    mixing = steps.mixture.config
    assert isinstance(mixing, Mixing)
    stages = mixing.stages
    per_step = config.train.train_batch_size * config.seq_len
    total = config.train.num_train_steps
    borders = [min(stage["step"], total) for stage in stages] + [total]
    tokens: dict[str, float] = {}
    for stage, start, end in zip(stages, borders, borders[1:], strict=False):
        for name, share in stage["shares"].items():
            tokens[name] = tokens.get(name, 0.0) + share * (end - start) * per_step
    return tokens


def _available(step: Step, root: Path) -> tuple[float | None, bool]:
    manifest = read_manifest(step.directory(root))
    if manifest is not None and manifest.fingerprint == step.fingerprint:
        return manifest.stats["splits"].get("train", {}).get("tokens", 0), True
    raw = step.upstream[0].config
    if isinstance(raw, RawFiles) and (found := _source_bytes(raw)) is not None:
        # compressed files hold several times their size
        compressed = sum(file.name.endswith((".gz", ".zst", ".zstd", ".bz2", ".xz")) for file in raw.files)
        return found * (4 if 2 * compressed > len(raw.files) else 1) / BYTES_PER_TOKEN, False
    return None, False
