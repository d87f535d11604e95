"""A committed mixture: its components' token stores, their weights, and the tokenizer they share."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.durable import sha256_of
from model.token_store import StoreError, TokenSplit, TokenStore, artifact_path, read_committed

MIXTURE_FILE = "mixture.json"


@dataclass(frozen=True)
class TokenizerFile:
    """The SentencePiece model of a mixture and the ids that matter to training."""

    path: Path
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int

    def check(self) -> None:
        """Raises StoreError where the file is missing or is not the one the tokens were made with."""
        if not self.path.is_file():
            raise StoreError(f"tokenizer {self.path} is missing; run the tokenizer step again")
        if (found := sha256_of(self.path)) != self.sha256:
            raise StoreError(
                f"tokenizer {self.path} has sha256 {found}, the tokens were made with {self.sha256}; run the tokenizer step again"
            )


@dataclass(frozen=True)
class MixtureComponent:
    """One dataset of a mixture. A weight of 0 means that it is only evaluated."""

    name: str
    weight: float
    store: TokenStore
    unigram_entropy: float

    def split(self, name: str) -> TokenSplit | None:
        """The stream of a split, or None where it holds no token."""
        split = self.store.splits.get(name)
        return split if split is not None and split.num_tokens else None


@dataclass(frozen=True)
class MixtureStore:
    """An opened mixture artifact. `unigram_entropy` is that of the mixed training tokens, in nats."""

    path: Path
    name: str
    fingerprint: str
    components: tuple[MixtureComponent, ...]
    tokenizer: TokenizerFile
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
            tokenizer = value["tokenizer"]
            return cls(
                path=directory,
                name=str(value["name"]),
                fingerprint=manifest["fingerprint"],
                components=tuple(_component(directory, entry, tokenizer["sha256"]) for entry in value["components"]),
                tokenizer=TokenizerFile(
                    path=_below(directory, tokenizer["path"]),
                    sha256=str(tokenizer["sha256"]),
                    vocab_size=int(tokenizer["vocab_size"]),
                    bos_id=int(tokenizer["bos_id"]),
                    eos_id=int(tokenizer["eos_id"]),
                ),
                unigram_entropy=float(value["unigram_entropy"]),
            )
        except StoreError:
            raise
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; run the mixture step again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is malformed ({type(error).__name__}: {error}); run the mixture step again") from None

    def component(self, name: str) -> MixtureComponent:
        """The component of that name. Raises StoreError naming those there are."""
        for component in self.components:
            if component.name == name:
                return component
        raise StoreError(f"the mixture {self.name!r} has no component {name!r}; it has {', '.join(c.name for c in self.components)}")

    def validation_names(self) -> tuple[str, ...]:
        """The components that have validation tokens, in the mixture's order."""
        return tuple(component.name for component in self.components if component.split("validation") is not None)


def _below(directory: Path, relative: str) -> Path:
    """`directory / relative`; mixtures name their neighbours by relative paths, so that a whole root can be moved."""
    return Path(os.path.normpath(directory / relative))


def _component(directory: Path, entry: dict[str, Any], tokenizer_sha256: str) -> MixtureComponent:
    store = TokenStore.open(_below(directory, entry["store"]))
    if store.fingerprint != entry["fingerprint"]:
        raise StoreError(
            f"component {entry['name']!r}: {store.path} is {store.fingerprint[:16]}, the mixture was made of "
            f"{entry['fingerprint'][:16]}; run the mixture step again"
        )
    if store.tokenizer_sha256 != tokenizer_sha256:
        raise StoreError(
            f"component {entry['name']!r} was tokenized with {store.tokenizer_sha256[:16]}, the mixture's tokenizer is "
            f"{tokenizer_sha256[:16]}; tokenize it again"
        )
    return MixtureComponent(str(entry["name"]), float(entry["weight"]), store, float(entry["unigram_entropy"]))
