"""Whether token ids mean the same to weights made elsewhere: a row of an embedding belongs to an id, whatever the shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.vocabularies.vocabulary import FILES, Vocabulary

# Indexed by a token's id; what an optimizer keeps of them has the same last name.
INDEXED_BY_ID = frozenset({"embed", "head"})

_PROBE = (
    "The quick brown fox jumps over the lazy dog; 1,234 times in 2026, said Professor Whitmore.\n"
    "def area(width: float) -> float:\n    return width ** 2\n"
    "Die Würde des Menschen ist unantastbar. Человек рождается свободным. 人人生而自由 すべての人間は أحرار"
)
# Two spellings of one vocabulary may split a text's beginning or its spaces otherwise; other vocabularies share few ids.
_LEAST_IN_COMMON = 0.8


def foreign_to_checkpoint(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Why ids of the data in `ours` are foreign to a checkpoint trained on `theirs` (both `BatchLoader.state`), or None."""
    if theirs.get("tokenizer") in (None, ours["tokenizer"]):
        return None
    return f"its rows are tokens of the tokenizer {theirs['tokenizer'][:16]}, and this run's mixture is of {ours['tokenizer'][:16]}"


def foreign_to_hf(directory: Path, tokenizer: Path) -> str | None:
    """Why the ids of `tokenizer` are foreign to a Hugging Face directory's weights, or None where they agree or it has no tokenizer.

    Raises:
        ValueError: a tokenizer cannot be read.
    """
    files = [directory / FILES[kind] for kind in ("huggingface", "sentencepiece") if (directory / FILES[kind]).is_file()]
    if not files:
        return None
    try:
        theirs = Counter(Vocabulary.open(files[0]).encode(_PROBE).tolist())
    except ValueError as error:
        raise ValueError(
            f"{files[0]} cannot be compared with the mixture's tokenizer ({error}): take it away to begin without comparing"
        ) from None
    ours = Counter(Vocabulary.open(tokenizer).encode(_PROBE).tolist())
    if (theirs & ours).total() >= _LEAST_IN_COMMON * max(theirs.total(), ours.total()):
        return None
    return f"its rows are tokens of {files[0]}, and this run's mixture is of {tokenizer}, which gives a text other ids"
