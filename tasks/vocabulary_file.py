"""Looks into SentencePiece model files: does it load, how many ids, which are BOS and EOS."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tasks.sources import DataError


@dataclass(frozen=True)
class VocabularyInfo:
    """What the rest of a run needs to know of a SentencePiece model."""

    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int


def inspect_vocabulary(path: str | Path) -> VocabularyInfo:
    """Loads the model at `path`. Raises DataError where it cannot be read, is no SentencePiece model, or lacks BOS or EOS."""
    # only runs that name a model file load the library
    from sentencepiece import SentencePieceProcessor

    file = Path(path).expanduser()
    try:
        data = file.read_bytes()
        if not data:
            raise DataError(f"tokenizer path={str(path)!r} has no bytes; give a SentencePiece .model file")
    except OSError as error:
        raise DataError(f"tokenizer path={str(path)!r} cannot be read ({error.strerror}); give a SentencePiece .model file") from None
    try:
        processor = SentencePieceProcessor(model_proto=data)
        size = processor.get_piece_size()
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"tokenizer path={str(path)!r} is not a SentencePiece model ({str(error)[:120]}); give a .model file") from None
    info = VocabularyInfo(
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=size,
        bos_id=processor.bos_id(),
        eos_id=processor.eos_id(),
        unk_id=processor.unk_id(),
        pad_id=processor.pad_id(),
    )
    for name, value in (("BOS", info.bos_id), ("EOS", info.eos_id)):
        if value < 0:
            raise DataError(f"tokenizer path={str(path)!r} defines no {name}; train it with both bos_id and eos_id 0 or above")
    return info
