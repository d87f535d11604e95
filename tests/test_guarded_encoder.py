"""A fast encoder under guard: what is checked, what goes to the reference, and what a difference leads to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from model.vocabularies.guarded_encoder import EncoderMismatch, GuardedEncoder
from model.vocabularies.vocabulary import Encoded, Vocabulary, joined


def same(first: Encoded, second: Encoded) -> bool:
    return np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


class Fake:
    """Byte ids, wrong where `wrong` says so."""

    name = "fake"

    def __init__(self, wrong: Callable[[str], bool] = lambda text: False) -> None:
        self.wrong, self.given, self.loaded = wrong, 0, False

    def encode_each(self, texts: Sequence[str]) -> tuple[list[np.ndarray | None], bool]:
        self.given += len(texts)
        return [self._encode(text) for text in texts], self.loaded

    def _encode(self, text: str) -> np.ndarray | None:
        ids = Vocabulary.open_bytes().encode(text)
        return np.append(ids, 0) if self.wrong(text) else ids


def guard(fake: Any) -> tuple[GuardedEncoder, list[str]]:
    """A guard over `fake`, and the texts that the reference is given."""
    reference = Vocabulary.open_bytes()
    seen: list[str] = []

    def encode(texts: Sequence[str]) -> Encoded:
        seen.extend(texts)
        return reference.encode_batch(texts)

    guarded = GuardedEncoder(fake, encode, ["a", "b"])
    seen.clear()
    return guarded, seen


def test_the_first_texts_and_every_hundredth_are_checked() -> None:
    fake = Fake()
    guarded, seen = guard(fake)
    texts = [f"text {number}" for number in range(1000)]
    assert same(guarded.encode_batch(texts[:250]), Vocabulary.open_bytes().encode_batch(texts[:250]))
    assert seen == [*texts[:16], texts[100], texts[200]]
    guarded.encode_batch(texts[250:301])
    assert seen[18:] == [texts[300]]
    fake.loaded = True  # a new object of the fast library: its first texts are checked
    guarded.encode_batch(texts[301:401])
    assert seen[19:] == [*texts[301:317], texts[400]]


def test_a_difference_is_raised_and_the_reference_used_from_then_on() -> None:
    fake = Fake()
    guarded, _ = guard(fake)
    texts = [f"text {number}" for number in range(150)]
    guarded.encode_batch(texts)
    fake.wrong = lambda text: text == "text 50"
    with pytest.raises(EncoderMismatch, match=r"fake gives other ids than the reference for a text of 7 characters .* 'text 50'"):
        guarded.encode_batch(texts)
    assert guarded.mismatch is not None
    given = fake.given
    assert same(guarded.encode_batch(texts), Vocabulary.open_bytes().encode_batch(texts))
    assert fake.given == given


def test_after_a_difference_the_library_is_used_and_not_the_reference_which_may_be_the_wrong_one() -> None:
    library = Vocabulary.open_bytes().encode_batch
    wrong_reference = Fake()

    def reference(texts: Sequence[str]) -> Encoded:
        return joined(ids for ids in wrong_reference.encode_each(texts)[0] if ids is not None)

    guarded = GuardedEncoder(Fake(), reference, ["a"], library=library)
    wrong_reference.wrong = lambda text: text == "text"
    with pytest.raises(EncoderMismatch):
        guarded.encode_batch(["text"])
    assert same(guarded.encode_batch(["text", "a"]), library(["text", "a"]))


def test_each_thread_that_was_given_doubtful_ids_is_told_once() -> None:
    fake = Fake()
    guarded, _ = guard(fake)
    told: dict[str, list[bool]] = {}
    steps = {name: threading.Barrier(2, timeout=20) for name in ("began", "found", "ended")}

    def mismatches() -> bool:
        try:
            guarded.encode_batch(["some text"])
        except EncoderMismatch:
            return True
        return False

    def other() -> None:
        told["other"] = [mismatches()]
        steps["began"].wait()
        steps["found"].wait()
        told["other"] += [mismatches(), mismatches()]
        steps["ended"].wait()

    thread = threading.Thread(target=other)
    thread.start()
    steps["began"].wait()
    fake.wrong = lambda text: text == "wrong"
    with pytest.raises(EncoderMismatch):
        guarded.encode_batch(["wrong"] * 100)
    steps["found"].wait()
    steps["ended"].wait()
    thread.join()
    assert told["other"] == [False, True, False]
    assert not mismatches()


def test_one_that_is_wrong_from_the_start_is_not_used_and_nothing_is_to_be_done_again() -> None:
    with pytest.raises(ValueError, match="fake gives other ids than the reference, for"):
        guard(Fake(lambda text: "zz" in text.lower() or "\r\n" in text))


def test_characters_that_they_differ_on_go_to_the_reference() -> None:
    # U+11DE0 is a digit since Unicode 17, and unassigned in the one that the libraries had before
    fake = Fake(lambda text: "\U00011de0" in text)
    guarded, seen = guard(fake)
    texts = ["plain", "new \U00011de0 digit", "its neighbour \U00011de9", "emoji \U0001f642", "\u65e5\u672c"]
    assert same(guarded.encode_batch(texts), Vocabulary.open_bytes().encode_batch(texts))
    assert [text for text in seen if "\U00011de0" in text][-1] == texts[1]
    seen.clear()
    fake.given = 0
    assert same(guarded.encode_batch(texts[1:] * 2), Vocabulary.open_bytes().encode_batch(texts[1:] * 2))
    assert seen == [texts[1]] * 2  # known by now: only those two, and nothing is compared again
    assert fake.given == 6


def test_a_text_that_the_fast_encoder_cannot_encode_goes_to_the_reference() -> None:
    class GivesUp(Fake):
        def _encode(self, text: str) -> np.ndarray | None:
            return None if text == "give up" else super()._encode(text)

    guarded, seen = guard(GivesUp())
    texts = ["a", "give up", "b"] * 40
    assert same(guarded.encode_batch(texts), Vocabulary.open_bytes().encode_batch(texts))
    assert seen.count("give up") == 40
    assert guarded.mismatch is None
