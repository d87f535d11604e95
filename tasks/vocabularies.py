"""Which tokenizer a mixture uses: a file that exists, bytes, or one to train. Plain configuration, no heavy import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from model.config_base import Config, runtime
from model.vocabularies.byte_pairs import LLAMA3_PATTERN


class SentencePieceTraining(Config):
    """A SentencePiece vocabulary trained on the mixture's own training documents, as a step of the run."""

    kind: Literal["sentencepiece_training"] = "sentencepiece_training"
    vocab_size: int = Field(default=2048, ge=300, le=1 << 20, description="Pieces, with the 3 special ones and the 256 bytes.")
    model_type: Literal["bpe", "unigram"] = Field(default="bpe", description="Llama tokenizers are bpe, and only those export to one.")
    character_coverage: float = Field(default=1.0, gt=0.9, le=1, description="Share of the characters that get a piece of their own.")
    byte_fallback: bool = Field(default=True, description="Spell other characters in bytes, so that no text is lost.")
    max_training_bytes: int = Field(default=64 << 20, ge=1, description="Train on at most so much text, from every dataset the same.")


class BytePairTraining(Config):
    """A byte-level BPE vocabulary, as Llama 3's, trained on the mixture's own training documents, as a step of the run."""

    kind: Literal["byte_pair_training"] = "byte_pair_training"
    vocab_size: int = Field(default=4096, ge=300, le=1 << 20, description="Ids, with the 256 bytes and the 2 special ones.")
    pattern: str = Field(default=LLAMA3_PATTERN, min_length=1, description="What text is split into before merges; a regular expression.")
    max_training_bytes: int = Field(default=64 << 20, ge=1, description="Train on at most so much text, from every dataset the same.")


class SentencePieceFile(Config):
    """A SentencePiece model that exists. Its content is its identity; where it lies is not."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    path: str = runtime(..., min_length=1, description="The `.model` file, a path or a URL; it must define BOS and EOS.")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="Its digest; needed for a URL without a revision.")
    vocab_size: int | None = Field(default=None, ge=2, description="Its number of ids; needed for a URL, so that a plan downloads nothing.")


class HuggingFaceFile(Config):
    """A `tokenizer.json` that exists, as the `tokenizers` library reads it.

    BOS and EOS are put around documents as ids; what the file's own post-processor would add is not added. Text that
    looks like a special token is plain text.
    """

    kind: Literal["huggingface"] = "huggingface"
    path: str = runtime(
        ..., min_length=1, description="The `tokenizer.json`, a path or a URL such as hf://org/name@revision/tokenizer.json."
    )
    bos_token: str | None = Field(
        default=None, description="Before each document. Unset: as tokenizer_config.json beside a local file says, else known names."
    )
    eos_token: str | None = Field(
        default=None, description="After each document. Unset: as tokenizer_config.json beside a local file says, else known names."
    )
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="Its digest; needed for a URL without a revision.")
    vocab_size: int | None = Field(default=None, ge=2, description="Its number of ids; needed for a URL, so that a plan downloads nothing.")


class TiktokenFile(Config):
    """A file of byte pairs by rank, as tiktoken and Llama 3's `tokenizer.model` have them."""

    kind: Literal["tiktoken"] = "tiktoken"
    path: str = runtime(..., min_length=1, description="The file, a path or a URL: a base64 token and its rank a line.")
    pattern: str = Field(default=LLAMA3_PATTERN, min_length=1, description="What text is split into before merges; a regular expression.")
    special_tokens: tuple[str, ...] = Field(
        default=("<|begin_of_text|>", "<|end_of_text|>"), min_length=1, description="Their ids follow the last rank, in this order."
    )
    bos_token: str | None = Field(default="<|begin_of_text|>", description="Before each document; None: nothing is.")
    eos_token: str = Field(default="<|end_of_text|>", description="After each document.")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="Its digest; needed for a URL without a revision.")
    vocab_size: int | None = Field(default=None, ge=2, description="Its number of ids; needed for a URL, so that a plan downloads nothing.")

    @model_validator(mode="after")
    def _check_tokens(self) -> TiktokenFile:
        for field, token in (("bos_token", self.bos_token), ("eos_token", self.eos_token)):
            if token is not None and token not in self.special_tokens:
                raise ValueError(f"tokenizer {field}={token!r} is none of special_tokens={self.special_tokens}; add it there")
        return self


class ByteTokenizer(Config):
    """Every byte of the UTF-8 text is an id, 3 to 258; 0 is padding, 1 BOS, 2 EOS (as ByT5 has its bytes)."""

    kind: Literal["bytes"] = "bytes"


TokenizerFile = SentencePieceFile | HuggingFaceFile | TiktokenFile
TokenizerTraining = SentencePieceTraining | BytePairTraining
Tokenizer = TokenizerTraining | TokenizerFile | ByteTokenizer
