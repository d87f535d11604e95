"""Strings on which tokenizers part ways: scripts, controls, runs of spaces, text that looks like a special token. Seeded."""

from __future__ import annotations

import random

_PIECES = (
    *("hello", " world", "a", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", " \n ", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff"),
    *("'s", "'S", "I'LL", "don't", "\u017f", "1", "12", "123", "1234", "3.14", "\u0967\u0968\u0969", "\u00bd", "\u2167"),
    *("--", "==== ", "_", "...", "#!", "/*", "\\", "\x00", "\x01", "\x7f", "\x85"),
    *("\u00e9", "e\u0301", "\u0130", "\u00df", "\ufb01", "\u1e69", "s\u0323\u0307", "q\u0323\u0307", "\u0391\u0392\u03b3"),
    *(
        "\u65e5\u672c\u8a9e",
        "\ud55c\uad6d\uc5b4",
        "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\ufdfa",
    ),
    *("\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7", "\ue000", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "\u2581", "\u2581\u2581x"),
    *("a" * 50, "ab" * 40, " " * 70, "9" * 40, "\n" * 30),
)
_RANGES = ((0x20, 0x7E), (0x20, 0x2FF), (0x300, 0x36F), (0x370, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF))


def adversarial_strings(number: int, seed: int = 0) -> list[str]:
    """That many strings of up to some hundred characters; the empty one comes first. No lone surrogates: those are no text."""
    draw = random.Random(seed)
    strings = [""]
    while len(strings) < number:
        pieces = [draw.choice(_PIECES) for _ in range(draw.randint(1, 12))]
        if draw.random() < 0.4:
            low, high = draw.choice(_RANGES)
            pieces.insert(draw.randrange(len(pieces) + 1), "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 20))))
        strings.append("".join(pieces))
    return strings[:number]
