"""The encoder that tokenization uses: the fastest one there is for a vocabulary, checked against the vocabulary's own library.

    encoder = CheckedEncoder(Vocabulary.open("tokenizers/abc"), "auto")
    ids, lengths = encoder.encode_batch(documents)

| vocabulary | encoder | checked against |
| --- | --- | --- |
| SentencePiece BPE, text as it is | gigatoken | tiktoken, itself checked against sentencepiece |
| tiktoken file | gigatoken | tiktoken |
| tokenizer.json, byte-level BPE | gigatoken | tiktoken, itself checked against tokenizers |
| any other | the vocabulary's own library | - |

gigatoken is the optional part: without it, or with accelerator "none", the next in the line is used.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from model.vocabularies.byte_pairs import tokenizer_json
from model.vocabularies.fast_encoders import GigatokenEncoder, SentencePieceByTiktoken, TiktokenEncoder
from model.vocabularies.guarded_encoder import Encode, EncoderMismatch, FastEncoder, GuardedEncoder
from model.vocabularies.huggingface_vocabulary import HuggingFaceVocabulary
from model.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from model.vocabularies.tiktoken_vocabulary import TiktokenVocabulary
from model.vocabularies.vocabulary import Encoded, Vocabulary

__all__ = ["Accelerator", "CheckedEncoder", "EncoderMismatch"]

Accelerator = Literal["auto", "none"]
# What a tokenizer.json says beyond splitting text into tokens, taken out.
_PLAIN: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


class CheckedEncoder:
    """Encodes as `vocabulary.encode_batch` does, faster where that is possible. May be shared between threads, and should be.

    Attributes:
        backend: what encodes, such as "gigatoken, checked against tiktoken"; known from the first text on.
        refused: why something faster is not used, a sentence each.
        mismatch: what differed, once a fast encoder was caught at other ids; None until then.
    """

    def __init__(self, vocabulary: Vocabulary, accelerator: Accelerator = "auto") -> None:
        """Cheap: encoders are loaded, and compared for a start (0.1 to 1 s), when the first text comes."""
        if accelerator not in ("auto", "none"):
            raise ValueError(f"accelerator={accelerator!r} is not known; use 'auto' or 'none'")
        self._vocabulary, self._accelerator = vocabulary, accelerator
        self._lock = threading.Lock()
        self._encode: Encode | None = None
        self._guards: list[GuardedEncoder] = []
        self.refused: list[str] = []

    @property
    def mismatch(self) -> str | None:
        """What differed, or None."""
        return next((guard.mismatch for guard in self._guards if guard.mismatch), None)

    @property
    def backend(self) -> str:
        """What encodes, and what it is checked against; after a mismatch the vocabulary's own library, or it under guard."""
        own = {"huggingface": "tokenizers"}.get(self._vocabulary.kind, self._vocabulary.kind)
        names = [guard.name for guard in reversed(self._guards)] if self.mismatch is None else []
        return ", checked against ".join([*names, own])

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids uint32 [total] of the texts in their order and lengths int64 [len(texts)]; no BOS or EOS.

        Raises:
            EncoderMismatch: a fast encoder was caught at other ids, after it had given this thread ids that may be wrong.
                What this thread has encoded since its last commit is to be encoded again; that and all later calls
                use the reference. It is raised once in each thread that it concerns.
            UnicodeEncodeError: half a surrogate pair; a ValueError.
        """
        with self._lock:
            if self._encode is None:
                self._encode = self._load()
        return self._encode(texts)

    def _load(self) -> Encode:
        vocabulary = self._vocabulary
        encode = vocabulary.encode_batch
        if isinstance(vocabulary, SentencePieceVocabulary):
            return self._sentencepiece(vocabulary)
        pairs = vocabulary.pairs if isinstance(vocabulary, HuggingFaceVocabulary | TiktokenVocabulary) else None
        if pairs is None:
            if vocabulary.kind == "huggingface":
                self.refused.append("the tokenizer.json is no plain byte-level BPE")
            return encode
        tokens = list(pairs.texts())
        if isinstance(vocabulary, HuggingFaceVocabulary):
            encode = self._guarded(encode, "tiktoken", lambda: TiktokenEncoder(pairs), tokens)
            return self._accelerated(encode, lambda: json.dumps({**vocabulary.content(), **_PLAIN}), tokens)
        return self._accelerated(encode, lambda: json.dumps(tokenizer_json(pairs, {})), tokens)

    def _accelerated(self, encode: Encode, make_json: Callable[[], str], tokens: Iterable[str]) -> Encode:
        """gigatoken over what `make_json` gives, held to `encode`; `encode` itself where that cannot be."""
        if self._accelerator == "none":
            return encode
        byte_pairs = self._vocabulary.kind != "sentencepiece"
        return self._guarded(encode, "gigatoken", lambda: GigatokenEncoder(make_json(), byte_pairs=byte_pairs), tokens)

    def _guarded(self, encode: Encode, name: str, make: Callable[[], FastEncoder], tokens: Iterable[str]) -> Encode:
        try:
            guard = GuardedEncoder(make(), encode, tokens, library=self._vocabulary.encode_batch)
        except ImportError:
            self.refused.append(f"{name} is not installed: pip install {name}")
        except ValueError as error:
            self.refused.append(str(error))
        else:
            self._guards.append(guard)
            return guard.encode_batch
        return encode

    def _sentencepiece(self, vocabulary: SentencePieceVocabulary) -> Encode:
        from model.vocabularies.sentencepiece_json import SentencePieceJson

        encode = vocabulary.encode_batch
        model = SentencePieceJson(vocabulary.data())
        unk_id = vocabulary.unk_id
        if (why := model.not_plain()) or unk_id is None:
            self.refused.append(why or "the SentencePiece model has no unknown piece")
            return encode
        tokens = list(model.texts())
        if (tables := model.byte_pairs()) is not None:
            encode = self._guarded(encode, "tiktoken", lambda: SentencePieceByTiktoken(*tables), tokens)
        return self._accelerated(encode, lambda: json.dumps(model.content(bos_id=None, unk_id=unk_id, special=False)), tokens)
