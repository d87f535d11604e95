"""A vocabulary as the tokenizer files of Hugging Face transformers, encoding to the same ids, with BOS before each text.

tokenizer.json and tokenizer_config.json for every kind; of a SentencePiece model also tokenizer.model, the file itself,
which llama.cpp and others read. transformers' LlamaTokenizer, given that file alone, rebuilds every model as BPE without
normalization: it is wrong for unigram models, for models with a normalizer, and for text that begins with a space. So the
class named in tokenizer_config.json is the one that takes tokenizer.json as it is, in transformers 4 and 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.durable import write_durably, write_json
from model.hf_config import SpecialIds
from model.vocabularies.byte_pairs import BYTE_CHARACTERS, added_token, bos_first, tokenizer_json
from model.vocabularies.byte_vocabulary import FIRST_BYTE
from model.vocabularies.huggingface_vocabulary import HuggingFaceVocabulary
from model.vocabularies.tiktoken_vocabulary import TiktokenVocabulary
from model.vocabularies.vocabulary import FILES, Vocabulary


def exportable(vocabulary: Vocabulary) -> str | None:
    """Why a vocabulary cannot be written for transformers, with the remedy, or None where it can be."""
    if vocabulary.kind != "sentencepiece":
        return None
    from model.vocabularies.sentencepiece_json import SentencePieceJson

    problem = SentencePieceJson(vocabulary.data()).problem()
    return None if problem is None else f"tokenizer {vocabulary.path} cannot be written for transformers, its {problem}"


class HfTokenizer:
    """One vocabulary, ready to be written beside an exported model."""

    def __init__(self, path: Path | str, *, vocab_size: int, seq_len: int) -> None:
        """Reads the vocabulary; writes nothing.

        Args:
            path: a tokenizer directory, or a bare tokenizer file, as Vocabulary.open takes them.
            vocab_size: rows of the model's embedding.
            seq_len: the model's context, in tokens.

        Raises:
            ValueError: it is no tokenizer, or it has more ids than the embedding has rows, or it is of a kind that
                `tokenizers` cannot represent.
        """
        self._vocabulary, self._seq_len = Vocabulary.open(path), seq_len
        if self._vocabulary.vocab_size > vocab_size:
            raise ValueError(
                f"{path} has {self._vocabulary.vocab_size} ids, more than model.vocab_size={vocab_size}: "
                f"give the tokenizer that the model was trained with"
            )
        if problem := exportable(self._vocabulary):
            raise ValueError(problem)
        self.special = SpecialIds(self._vocabulary.bos_id, self._vocabulary.eos_id, self._vocabulary.pad_id)
        self._content, self._names = _content(self._vocabulary)

    def write(self, directory: Path) -> None:
        """Writes the files, each whole or not at all."""
        if self._vocabulary.kind == "sentencepiece":
            write_durably(directory / FILES["sentencepiece"], self._vocabulary.data())
        write_json(directory / "tokenizer.json", self.tokenizer_json())
        write_json(directory / "tokenizer_config.json", self.tokenizer_config())

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        special, unk_id = self.special, self._vocabulary.unk_id
        named = {"bos_token": special.bos, "eos_token": special.eos, "unk_token": unk_id, "pad_token": special.pad}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{field: self._names[token_id] for field, token_id in named.items() if token_id is not None},
            "add_bos_token": special.bos is not None,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._seq_len,
            "model_input_names": ["input_ids", "attention_mask"],
        }

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return self._content


def _content(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[int, str]]:
    """tokenizer.json of a vocabulary, and the names of its special tokens by their ids."""
    names = {token_id: text for text, token_id in vocabulary.special_tokens.items()}
    bos = None if vocabulary.bos_id is None else names[vocabulary.bos_id]
    if isinstance(vocabulary, HuggingFaceVocabulary):
        return _with_own_special_tokens(vocabulary, bos)
    if isinstance(vocabulary, TiktokenVocabulary):
        return tokenizer_json(vocabulary.pairs, vocabulary.special_tokens, bos=bos), names
    if vocabulary.kind == "bytes":
        return _bytes_json(vocabulary, bos), names
    from model.vocabularies.sentencepiece_json import SentencePieceJson

    model = SentencePieceJson(vocabulary.data())
    # every SentencePiece model has an unknown piece
    content = model.content(bos_id=vocabulary.bos_id, unk_id=vocabulary.unk_id or 0)
    return content, dict(enumerate(model.pieces))


def _with_own_special_tokens(vocabulary: HuggingFaceVocabulary, bos: str | None) -> tuple[dict[str, Any], dict[int, str]]:
    """The file as it is, but that each text begins with our BOS and with nothing else."""
    content = vocabulary.content()
    vocab = content["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece[0]: index for index, piece in enumerate(vocab)}
    added = list(content.get("added_tokens") or [])
    # BOS and EOS that are tokens of the model become special ones, as transformers needs them
    known = {token["id"] for token in added}
    added += [added_token(text, token_id) for text, token_id in vocabulary.special_tokens.items() if token_id not in known]
    processor = None if bos is None else bos_first(bos, vocabulary.special_tokens[bos])
    changed = {
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": processor,
    }
    names = {token_id: text for text, token_id in ids.items()} | {token["id"]: token["content"] for token in added}
    return {**content, **changed}, names


def _bytes_json(vocabulary: Vocabulary, bos: str | None) -> dict[str, Any]:
    """Bytes as a byte-level BPE without merges, their ids behind the special ones."""
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(text, token_id) for text, token_id in vocabulary.special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": bytes_step,
        "post_processor": None if bos is None else bos_first(bos, vocabulary.special_tokens[bos]),
        "decoder": {**bytes_step, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary.special_tokens | {character: byte + FIRST_BYTE for byte, character in BYTE_CHARACTERS.items()},
            "merges": [],
        },
    }
