"""A SentencePiece model spelled out as a tokenizer.json, or as byte pairs, encoding to the same ids."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from model.vocabularies.byte_pairs import BytePairs, added_token, bos_first

_SPACE = "\u2581"  # SentencePiece's visible space
_pb2: Any = sentencepiece_model_pb2  # generated at import, so a type checker sees no members
_Piece = _pb2.ModelProto.SentencePiece
_TrainerSpec = _pb2.TrainerSpec


def _as_bytes(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode()


class SentencePieceJson:
    """One model, read; nothing is written."""

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a `.model` file that the sentencepiece library has loaded."""
        self._proto = _pb2.ModelProto.FromString(model)
        entries = [(piece.piece, piece.score, piece.type) for piece in self._proto.pieces]
        self.pieces: list[str] = [piece for piece, _, _ in entries]
        self._scores: list[float] = [score for _, score, _ in entries]
        self._types: list[int] = [kind for _, _, kind in entries]

    def problem(self) -> str | None:
        """Why a tokenizer.json cannot have the same ids, with the remedy, or None."""
        trainer, normalizer = self._proto.trainer_spec, self._proto.normalizer_spec
        if trainer.model_type not in (_TrainerSpec.BPE, _TrainerSpec.UNIGRAM):
            return f"model_type={_TrainerSpec.ModelType.Name(trainer.model_type)}: train it as bpe or unigram"
        if trainer.treat_whitespace_as_suffix:
            return "treat_whitespace_as_suffix=true: train it with false"
        if not normalizer.escape_whitespaces:
            return "escape_whitespaces=false: train it with true"
        return None

    def not_plain(self) -> str | None:
        """Why it is more than a BPE over the text as it is, which is what fast encoders do exactly, or None."""
        trainer, normalizer = self._proto.trainer_spec, self._proto.normalizer_spec
        if self.problem() or trainer.model_type != _TrainerSpec.BPE or not trainer.byte_fallback:
            return "the SentencePiece model is no bpe with byte_fallback"
        if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
            return "the SentencePiece model normalizes text"
        types = Counter(self._types)
        if types[_Piece.USER_DEFINED] or types[_Piece.UNUSED] or types[_Piece.BYTE] != 256:
            return "the SentencePiece model has user-defined or unused pieces"
        joined = [(text, self._scores[token_id]) for text, token_id in self._normal() if len(text) > 1]
        # of pieces with one score SentencePiece joins the leftmost first; only for runs of spaces is the order known to be no matter
        scores = Counter(score for text, score in joined if text.strip(_SPACE))
        runs = {score for text, score in joined if not text.strip(_SPACE)}
        if any(number > 1 or score in runs for score, number in scores.items()):
            return "pieces of the SentencePiece model share a score"
        return None

    def texts(self) -> Iterator[str]:
        """The pieces that text is made of, as text, in the order of their ids."""
        return (text.replace(_SPACE, " ") for text, _ in self._normal())

    def _normal(self) -> list[tuple[str, int]]:
        """The pieces that text is made of, with their ids, in the order of these."""
        return [(text, token_id) for token_id, text in enumerate(self.pieces) if self._types[token_id] == _Piece.NORMAL]

    def byte_pairs(self) -> tuple[BytePairs, list[list[int]]] | None:
        """Tables for tiktoken over the text with a space in front and U+2581 as a space, and the ids of each rank.

        The bytes of a character that has a piece are joined before anything else, then pieces by their score, which is what
        SentencePiece does with characters. Where only some bytes of a character were joined (it has no piece of its own)
        the rank stands for several ids, those of the bytes.
        None where a piece goes on behind a space, so that text cannot be split at spaces, or text has no space in front.
        """
        normal = self._normal()
        if not self._proto.normalizer_spec.add_dummy_prefix or any(_SPACE in text.lstrip(_SPACE) for text, _ in normal):
            return None
        byte_ids = [token_id for token_id, kind in enumerate(self._types) if kind == _Piece.BYTE]
        ranks = {bytes([byte]): byte for byte in range(256)}
        ids = [[token_id] for token_id in byte_ids]
        characters = [(_as_bytes(text), token_id) for text, token_id in normal if len(text) == 1]
        for size in range(1, 5):
            for text, token_id in characters:
                part = text[:size]
                if part not in ranks:
                    ranks[part] = len(ids)
                    ids.append([byte_ids[byte] for byte in part])
                if len(text) == size:
                    ids[ranks[part]] = [token_id]
        for text, token_id in sorted(normal, key=lambda entry: -self._scores[entry[1]]):
            if len(text) > 1:
                ranks[_as_bytes(text)] = len(ids)
                ids.append([token_id])
        return BytePairs(ranks, " *[^ ]+| +"), ids

    def content(self, *, bos_id: int | None, unk_id: int, special: bool = True) -> dict[str, Any]:
        """The content of tokenizer.json: normalizer, model, decoder, and the BOS that every text begins with.

        `special=False` leaves special tokens and BOS out.
        """
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self._proto.normalizer_spec.add_dummy_prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens() if special else [],
            "normalizer": {"type": "Sequence", "normalizers": self._normalizers()},
            "pre_tokenizer": None,
            "post_processor": bos_first(self.pieces[bos_id], bos_id) if special and bos_id is not None else None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._bpe(unk_id) if self._proto.trainer_spec.model_type == _TrainerSpec.BPE else self._unigram(unk_id),
        }

    def _normalizers(self) -> list[dict[str, Any]]:
        spec = self._proto.normalizer_spec
        steps: list[dict[str, Any]] = []
        if spec.precompiled_charsmap:
            steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode("ascii")})
        if spec.remove_extra_whitespaces:
            steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
            steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        if spec.add_dummy_prefix:
            steps.append({"type": "Prepend", "prepend": _SPACE})
        return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]

    def _added_tokens(self) -> list[dict[str, Any]]:
        """Control pieces, which text never yields in SentencePiece, and user-defined pieces, which are never split."""
        whole = {_Piece.CONTROL: True, _Piece.UNKNOWN: True, _Piece.USER_DEFINED: False}
        return [
            added_token(text, token_id, special=whole[self._types[token_id]])
            for token_id, text in enumerate(self.pieces)
            if self._types[token_id] in whole
        ]

    def _unigram(self, unk_id: int) -> dict[str, Any]:
        return {
            "type": "Unigram",
            "unk_id": unk_id,
            "vocab": [[text, score] for text, score in zip(self.pieces, self._scores, strict=True)],
            "byte_fallback": self._proto.trainer_spec.byte_fallback,
        }

    def _bpe(self, unk_id: int) -> dict[str, Any]:
        """SentencePiece's BPE joins the adjacent pair whose result has the best score; here that is a ranked list of pairs."""
        ids = dict(self._normal())
        merges: list[tuple[float, int, str, str]] = []
        for text, token_id in ids.items():
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in ids and right in ids:
                    merges.append((-self._scores[token_id], token_id, left, right))
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": self.pieces[unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": self._proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: token_id for token_id, piece in enumerate(self.pieces)},
            "merges": [[left, right] for _, _, left, right in sorted(merges, key=lambda merge: merge[:2])],
        }
