"""A committed mixture: its components' token stores, their shares, how they are packed, and the tokenizer they share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.token_store import StoreError, TokenSplit, TokenStore, artifact_path, read_committed, with_tail

MIXTURE_FILE = "mixture.json"
PACKINGS = ("concat", "best_fit")


@dataclass(frozen=True)
class MixtureTokenizer:
    """The tokenizer of a mixture: its directory, its digest, and the ids that matter to training."""

    path: Path
    digest: str
    vocab_size: int
    bos_id: int | None
    eos_id: int

    @classmethod
    def of(cls, directory: Path, entry: Mapping[str, Any]) -> MixtureTokenizer:
        """As `mixture.json` in `directory` names it."""
        return cls(
            path=_below(directory, entry["path"]),
            digest=str(entry["digest"]),
            vocab_size=int(entry["vocab_size"]),
            bos_id=None if entry["bos_id"] is None else int(entry["bos_id"]),
            eos_id=int(entry["eos_id"]),
        )

    @classmethod
    def of_mixture(cls, directory: Path, fingerprint: str) -> MixtureTokenizer:
        """The tokenizer of the mixture of that fingerprint in `directory`, whether or not its token stores are there.

        Raises StoreError where the mixture is not there, or is another.
        """
        if (found := read_committed(directory)["fingerprint"]) != fingerprint:
            raise StoreError(f"{directory} is the mixture {found[:16]}, not {fingerprint[:16]}")
        return cls.read(directory)

    @classmethod
    def read(cls, directory: Path) -> MixtureTokenizer:
        """The tokenizer that the mixture in `directory` names. Raises StoreError where that cannot be read."""
        try:
            return cls.of(directory, json.loads((directory / MIXTURE_FILE).read_text(encoding="utf-8"))["tokenizer"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{directory / MIXTURE_FILE} cannot be read ({type(error).__name__}: {error})") from None

    @cached_property
    def byte_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The UTF-8 bytes that each id stands for within a document, and as its first token: int64 [vocab_size] both.

        Raises ValueError where the tokenizer cannot be opened.
        """
        from model.vocabularies.vocabulary import Vocabulary  # not needed to read tokens

        vocabulary = Vocabulary.open(self.path)
        return vocabulary.byte_lengths(), vocabulary.opening_byte_lengths()

    def check(self) -> None:
        """Raises StoreError where the tokenizer is missing or damaged, or is not the one the tokens were made with."""
        from model.vocabularies.vocabulary import Vocabulary  # not needed to read tokens

        if not self.path.exists():
            raise StoreError(f"tokenizer {self.path} is missing; run the tokenizer step again")
        try:
            found = Vocabulary.open(self.path).digest
        except (OSError, ValueError) as error:
            raise StoreError(f"tokenizer {self.path} cannot be used ({error}); run the tokenizer step again") from error
        if found != self.digest:
            raise StoreError(
                f"tokenizer {self.path} has the digest {found}, the tokens were made with {self.digest}; run the tokenizer step again"
            )


@dataclass(frozen=True)
class MixtureComponent:
    """One dataset of a mixture. `splits` has the held-out tail, where there is one, behind "validation"."""

    name: str
    store: TokenStore
    splits: Mapping[str, TokenSplit]
    unigram_entropy: float
    max_epochs: float | None = None

    def split(self, name: str) -> TokenSplit | None:
        """The stream of a split, or None where it holds no token."""
        split = self.splits.get(name)
        return split if split is not None and split.num_tokens else None


@dataclass(frozen=True)
class MixtureStage:
    """Shares by component name, adding up to 1, from train step `step` on."""

    step: int
    shares: Mapping[str, float]


@dataclass(frozen=True)
class SimulatedEpochs:
    """Each component is cut to the share experiment_tokens / target_tokens of its windows."""

    experiment_tokens: int
    target_tokens: int


@dataclass(frozen=True)
class MixtureStore:
    """An opened mixture artifact. `unigram_entropy` is that of the mixed training tokens, in nats."""

    path: Path
    name: str
    fingerprint: str
    components: tuple[MixtureComponent, ...]
    stages: tuple[MixtureStage, ...]
    packing: str
    simulated_epoching: SimulatedEpochs | None
    tokenizer: MixtureTokenizer
    unigram_entropy: float

    @classmethod
    def open(cls, mixture: Any) -> MixtureStore:
        """Opens a mixture artifact (anything with `.path`) or its directory, and the stores it names.

        Raises StoreError where it is not committed, or where a store is not the one the mixture was made of.
        """
        directory = artifact_path(mixture)
        manifest = read_committed(directory)
        path = directory / MIXTURE_FILE
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            tokenizer, simulated = value["tokenizer"], value["simulated_epoching"]
            components = tuple(_component(directory, entry, tokenizer["digest"]) for entry in value["components"])
            return cls(
                path=directory,
                name=str(value["name"]),
                fingerprint=manifest["fingerprint"],
                components=components,
                stages=_stages(value["stages"], [component.name for component in components]),
                packing=_packing(value["packing"]),
                simulated_epoching=None if simulated is None else _simulated(simulated),
                tokenizer=MixtureTokenizer.of(directory, tokenizer),
                unigram_entropy=float(value["unigram_entropy"]),
            )
        except StoreError:
            raise
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; run the mixture step again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is malformed ({type(error).__name__}: {error}); run the mixture step again") from None

    def component(self, name: str) -> MixtureComponent:
        """The component of that name. Raises StoreError naming those there are."""
        for component in self.components:
            if component.name == name:
                return component
        raise StoreError(f"the mixture {self.name!r} has no component {name!r}; it has {', '.join(c.name for c in self.components)}")

    def trained(self) -> tuple[MixtureComponent, ...]:
        """The components that some stage trains on, in the mixture's order."""
        names = {name for stage in self.stages for name, share in stage.shares.items() if share}
        return tuple(component for component in self.components if component.name in names)

    def validation_names(self) -> tuple[str, ...]:
        """The components that have validation tokens, in the mixture's order."""
        return tuple(component.name for component in self.components if component.split("validation") is not None)


def _below(directory: Path, relative: str) -> Path:
    """`directory / relative`; mixtures name their neighbours by relative paths, so that a whole root can be moved."""
    return Path(os.path.normpath(directory / relative))


def _component(directory: Path, entry: dict[str, Any], tokenizer_digest: str) -> MixtureComponent:
    store = TokenStore.open(_below(directory, entry["store"]))
    name = str(entry["name"])
    if store.fingerprint != entry["fingerprint"]:
        raise StoreError(
            f"component {name!r}: {store.path} is {store.fingerprint[:16]}, the mixture was made of "
            f"{entry['fingerprint'][:16]}; run the mixture step again"
        )
    if store.tokenizer_digest != tokenizer_digest:
        raise StoreError(
            f"component {name!r} was tokenized with {store.tokenizer_digest[:16]}, the mixture's tokenizer is "
            f"{tokenizer_digest[:16]}; tokenize it again"
        )
    splits = with_tail(store.splits, int(entry["tail_tokens"]), f"component {name!r}")
    limit = entry["max_epochs"]
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"max_epochs of {name!r} is {limit!r}")
    return MixtureComponent(name, store, splits, float(entry["unigram_entropy"]), None if limit is None else float(limit))


def _stages(entries: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[MixtureStage, ...]:
    stages = tuple(
        MixtureStage(int(entry["step"]), {str(name): float(share) for name, share in entry["shares"].items()}) for entry in entries
    )
    steps = [stage.step for stage in stages]
    if steps[:1] != [0] or steps != sorted(set(steps)):
        raise ValueError(f"stages start at the steps {steps}")
    for stage in stages:
        if not set(stage.shares) <= set(names) or not any(stage.shares.values()):
            raise ValueError(f"the stage of step {stage.step} has the shares {dict(stage.shares)}")
        if not all(math.isfinite(share) and share >= 0 for share in stage.shares.values()):
            raise ValueError(f"the stage of step {stage.step} has the shares {dict(stage.shares)}")
    return stages


def _packing(value: Any) -> str:
    if value not in PACKINGS:
        raise ValueError(f"packing is {value!r}")
    return value


def _simulated(value: dict[str, Any]) -> SimulatedEpochs:
    simulated = SimulatedEpochs(int(value["experiment_tokens"]), int(value["target_tokens"]))
    if not 1 <= simulated.experiment_tokens <= simulated.target_tokens:
        raise ValueError(f"simulated_epoching is {value}")
    return simulated
