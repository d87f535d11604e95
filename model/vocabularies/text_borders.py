"""Where a long text can be cut so that the ids of its parts, one after the other, are those of the whole.

A library that encodes 16 MiB at once holds up to 4 GB meanwhile, so longer texts are given to it in parts. A cut is made only
where it is known to change no id:

* Byte-level tokens are made within the pieces that a pattern finds. In each pattern of `_PATTERNS` a match that has a letter
  goes on, if at all, with a letter, a mark or an apostrophe. So a letter before one of `_AFTER` ends its match, whatever is
  around it; and the matches on both sides are the same without the other side, since the patterns look behind nowhere, and
  ahead only behind white space.
* Tokens of a SentencePiece BPE are joined from neighbours, and only to pieces of the vocabulary. Between two characters that
  are neighbours in none of them nothing is ever joined.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from model.vocabularies.byte_pairs import GPT2_PATTERN, LLAMA3_PATTERN

# Characters; a text with fewer is never cut. Of a text with more, parts have as many or a few more.
LONG_TEXT = 1 << 17
# The place of the first border at or after a position in a text, between 1 and its last character; None where there is none.
NextBorder = Callable[[str, int], int | None]

_QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_CASED[2]}|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_CASED[2]}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = frozenset((GPT2_PATTERN, LLAMA3_PATTERN, _QWEN2_PATTERN, _O200K_PATTERN))
# White space, digits and punctuation, which no normalization of Unicode changes or joins with what is before them.
_AFTER = frozenset(string.digits + string.punctuation + " \t\r\n\u3001\u3002\u300c\u300d\u300e\u300f\u2014\u201c\u201d") - {"'"}
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def parts_of_text(text: str, next_border: NextBorder | None) -> list[str]:
    """The text in parts of LONG_TEXT characters, each up to the border that follows: longer where there is none."""
    parts: list[str] = []
    start = 0
    while next_border is not None and len(text) - start > LONG_TEXT:
        border = next_border(text, start + LONG_TEXT)
        if border is None:
            break
        parts.append(text[start:border])
        start = border
    return [*parts, text[start:] if start else text]


def pattern_borders(pattern: str | None, tokens: Iterable[str] = ()) -> NextBorder | None:
    """Borders between the pieces that a pattern splits text into, or None where they are not known for it.

    tokens: what is found in the text beforehand and kept whole; no border is inside one.
    """
    if pattern not in _PATTERNS:
        return None
    spellings = {spelling for token in tokens for spelling in (token, *(unicodedata.normalize(form, token) for form in _FORMS))}
    inside = {after for spelling in spellings for before, after in pairwise(spelling) if before.isalpha()}
    after = re.escape("".join(sorted(_AFTER - inside)))
    candidates = re.compile(rf"[^\W\d_](?=[{after}])")

    def next_border(text: str, start: int) -> int | None:
        found = candidates.finditer(text, start - 1)
        return next((match.end() for match in found if _is_letter(match[0])), None)

    return next_border


def _is_letter(character: str) -> bool:
    """Whether it is a letter for every version of Unicode, and no normalization ends it with something else."""
    return unicodedata.ucd_3_2_0.category(character)[0] == "L" and unicodedata.normalize("NFKD", character) == character


def piece_borders(pieces: Iterable[str], before: set[str] | None = None) -> NextBorder:
    """Borders between characters that are neighbours in no piece.

    before: the characters that a border may follow; None: all.
    """
    neighbours = {piece[index : index + 2] for piece in pieces for index in range(len(piece) - 1)}

    def next_border(text: str, start: int) -> int | None:
        places = (
            place
            for place in range(start, len(text))
            if text[place - 1 : place + 1] not in neighbours and (before is None or text[place - 1] in before)
        )
        return next(places, None)

    return next_border


def encode_parts(
    texts: Sequence[str], parts_of: Callable[[str], Sequence[str]], encode: Callable[[list[str]], Iterable[np.ndarray]]
) -> list[np.ndarray]:
    """The ids of each text, encoded part by part, of about LONG_TEXT characters at a time.

    encode: gives the ids of each of the parts that it is given.
    """
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    waiting: list[tuple[int, str]] = []
    characters = 0

    def encode_waiting() -> None:
        for (number, _), part_ids in zip(waiting, encode([part for _, part in waiting]), strict=True):
            ids[number].append(part_ids)
        waiting.clear()

    for number, text in enumerate(texts):
        for part in (text,) if len(text) <= LONG_TEXT else parts_of(text):
            if waiting and characters + len(part) > LONG_TEXT:
                encode_waiting()
                characters = 0
            waiting.append((number, part))
            characters += len(part)
    if waiting:
        encode_waiting()
    return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]
