"""A fast encoder that is held to the ids of a slower reference, text by text.

Three checks, since a fast encoder is trusted with the training data of a whole run:

* Before its first text, it encodes every token of the vocabulary and texts drawn from spaces, line ends, digits, letters
  and marks in any order. A difference here means that it is not used.
* It is given a text only if each of its characters is known to be of the same class (letter, digit, space, mark) for both.
  Each library has the Unicode tables of its own version, so this is known of characters that Unicode 3.2 had and has not
  reclassified since. Others are compared, in surroundings that tell classes apart and in blocks of 256, when a text first
  has one; a text with a character that they differ on goes to the reference.
* A sample of the texts is encoded by both: the first 16 after the fast encoder was loaded, and every hundredth.

A difference in the sample raises EncoderMismatch, since what was encoded before may be wrong too, and from then on only the
vocabulary's own library is used: the reference may be a fast encoder under guard itself, and then either can be the wrong one.
"""

from __future__ import annotations

import functools
import random
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from model.vocabularies.fast_encoders import FlatIds
from model.vocabularies.vocabulary import Encoded, joined, parts_of

FIRST_CHECKED, CHECKED_EVERY = 16, 100
_BLOCK = 256
_END_OF_UNICODE_3_2 = 0x2FA20  # beyond are only tags and private use, which are compared like new characters
_SURROUNDINGS = " {c}{c} a{c}b 1{c}2 !{c}!\n{c}\n\n'{c} x'{c} {c}'s Ab{c}Cd AB{c}cd\t{c}  {c}"
_SYMBOLS = (
    *(" ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "a", "Z", "the", "ing", "1", "23", "456", ".", ", ", "!", "--", "==", "_", "'", '"'),
    *("'s", "'S", "'LL", "'re", "<", "|", ">", "/", "\\", "\0", "\x7f", "\u00a0", "\u00e9", "\u3000", "\u65e5\u672c", "\u0967"),
    *("\u017f", "\u2028", "\u200b", "e\u0301", "\u2019", "\u00bd", "\u2581", "\U0001f642"),
)


Encode = Callable[[Sequence[str]], Encoded]


class EncoderMismatch(RuntimeError):
    """The fast encoder gave other ids than the reference. Encode again from the start of what is not committed."""


class FastEncoder(Protocol):
    """Something fast whose ids may be wrong."""

    name: str

    def encode_each(self, texts: Sequence[str]) -> tuple[Sequence[np.ndarray | None], bool]:
        """Ids uint32 of each text (None: it cannot encode that one), and whether it was loaded for this call."""
        ...


class GuardedEncoder:
    """`fast` where it is known to be right, `reference` elsewhere. May be used from several threads at once."""

    def __init__(self, fast: FastEncoder, reference: Encode, tokens: Iterable[str], *, library: Encode | None = None) -> None:
        """Compares the two first.

        Args:
            fast: what is to be used.
            reference: what it is held to.
            tokens: the vocabulary's tokens as text, for the comparison.
            library: what is used once they differed; by default the reference.

        Raises:
            ValueError: they differ, so that there is nothing to be gained.
        """
        self.name = fast.name
        self.mismatch: str | None = None
        self._fast, self._reference, self._library = fast, reference, library or reference
        self._lock = threading.RLock()
        self._encoded = 0
        self._fresh = True  # nothing but the comparison was encoded yet
        self._users: set[int] = set()  # threads that hold ids of the fast encoder
        self._compared: set[int] = set()  # blocks
        self._trusted: set[str] = set()  # their characters that both encode alike
        self._newer = _not_stable()
        self._compare_first(tokens)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids uint32 [total] and lengths int64 [len(texts)], as Vocabulary.encode_batch gives them.

        Raises EncoderMismatch once in each thread that was given ids by the fast encoder before a difference was found.
        """
        self._raise_mismatch()
        if self.mismatch is not None:
            return self._library(texts)
        fit = [index for index, text in enumerate(texts) if text.isascii() or self._fits(text)]
        all_fit = len(fit) == len(texts)
        results, loaded = self._fast.encode_each(texts if all_fit else [texts[index] for index in fit])
        if not all_fit:
            spread: list[np.ndarray | None] = [None] * len(texts)
            for index, ids in zip(fit, results, strict=True):
                spread[index] = ids
            results = spread
        self._check_sample(texts, results, loaded)
        if isinstance(results, FlatIds):
            return results.ids.astype(np.uint32, copy=False), np.diff(results.ends).astype(np.int64, copy=False)
        whole = list(results)
        rest = [index for index, ids in enumerate(whole) if ids is None]
        if rest:
            for index, ids in zip(rest, parts_of(self._reference([texts[index] for index in rest])), strict=True):
                whole[index] = ids
        return joined(whole)  # pyright: ignore[reportArgumentType]  # none of them is None any more

    def _check_sample(self, texts: Sequence[str], results: Sequence[np.ndarray | None], loaded: bool) -> None:
        with self._lock:
            first, self._encoded = self._encoded, self._encoded + len(texts)
            loaded, self._fresh = loaded or self._fresh, False
            self._users.add(threading.get_ident())
        chosen = {*range(-first % CHECKED_EVERY, len(texts), CHECKED_EVERY), *range(min(FIRST_CHECKED, len(texts)) if loaded else 0)}
        sample = [index for index in sorted(chosen) if results[index] is not None]
        expected = parts_of(self._reference([texts[index] for index in sample])) if sample else []
        for index, ids in zip(sample, expected, strict=True):
            if not np.array_equal(results[index], ids):  # pyright: ignore[reportArgumentType]
                text = texts[index]
                self.mismatch = (
                    f"{self.name} gives other ids than the reference for a text of {len(text):,} characters that begins with "
                    f"{text[:60]!r}; it is not used any more"
                )
        self._raise_mismatch()

    def _raise_mismatch(self) -> None:
        if self.mismatch is not None:
            with self._lock:
                held = threading.get_ident() in self._users
                self._users.discard(threading.get_ident())
            if held:
                raise EncoderMismatch(self.mismatch)

    def _same(self, texts: Sequence[str]) -> list[bool | None]:
        """For each text, whether both encoders give the same ids; None where the fast one leaves it to the reference."""
        fast, _ = self._fast.encode_each(texts)
        expected = parts_of(self._reference(texts))
        return [None if ids is None else np.array_equal(ids, other) for ids, other in zip(fast, expected, strict=True)]

    def _compare_first(self, tokens: Iterable[str]) -> None:
        draw = random.Random(0)  # noqa: S311  # the same texts each time
        texts = ["".join(draw.choices(_SYMBOLS, k=400)) for _ in range(100)]
        texts += ["", *_SYMBOLS, *(first + second for first in _SYMBOLS for second in _SYMBOLS)]
        # each token by itself, between spaces or line ends
        apart = [token if token.startswith(" ") else f"\n{token}" for token in tokens]
        texts += ["".join(apart[start : start + 64]) for start in range(0, len(apart), 64)]
        texts += ["".join(_SURROUNDINGS.format(c=chr(code)) for code in range(256))]
        # runs, in which equal neighbours can be joined from either end
        texts += [mark * length for mark in (" ", "\n", "=", "-", "a", "0") for length in range(1, 130)]
        for text, same in zip(texts, self._same(texts), strict=True):
            if same is False:
                raise ValueError(f"{self.name} gives other ids than the reference, for {text[:60]!r} for one")

    def _fits(self, text: str) -> bool:
        """Whether the fast encoder is known to be right about each character of `text`."""
        if self._newer.search(text) is None:
            return True
        characters = set(self._newer.findall(text))
        if not characters <= self._trusted:
            with self._lock:
                for block in sorted({ord(character) // _BLOCK for character in characters} - self._compared):
                    self._compare_block(block)
        return characters <= self._trusted

    def _compare_block(self, block: int) -> None:
        codes = (code for code in range(block * _BLOCK, (block + 1) * _BLOCK) if not 0xD800 <= code < 0xE000)
        characters = [character for character in map(chr, codes) if self._newer.match(character)]
        texts = [_SURROUNDINGS.format(c=character) for character in characters]
        trusted = characters
        if characters and not self._same(["".join(texts)])[0]:
            trusted = [character for character, same in zip(characters, self._same(texts), strict=True) if same]
            # different only together: then none of them is trusted
            trusted = trusted if len(trusted) < len(characters) else []
        self._trusted.update(trusted)
        self._compared.add(block)


@functools.cache
def _not_stable() -> re.Pattern[str]:
    """Finds characters other than those that have had one general category since Unicode 3.2."""
    then, now = unicodedata.ucd_3_2_0.category, unicodedata.category
    codes = [
        code for code in range(_END_OF_UNICODE_3_2) if (category := then(chr(code))) not in ("Cn", "Cs") and category == now(chr(code))
    ]
    stable = set(codes)
    starts, ends = [code for code in codes if code - 1 not in stable], [code for code in codes if code + 1 not in stable]
    ranges = "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))
    return re.compile(f"[^{ranges}]")
