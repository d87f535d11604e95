"""A SentencePiece model as the tokenizer files of Hugging Face transformers, encoding to the same ids.

Three files: tokenizer.model (the SentencePiece file itself, which llama.cpp and others read), tokenizer.json (the same
model spelled out for the `tokenizers` library) and tokenizer_config.json. The middle one is needed because the
LlamaTokenizer class, given tokenizer.model alone, rebuilds every model as BPE without normalization: it is wrong for
unigram models, for models with a normalizer, and for text that begins with a space.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from model.durable import write_durably, write_json
from model.hf_config import SpecialIds

_SPACE = "\u2581"  # SentencePiece's visible space
_pb2: Any = sentencepiece_model_pb2  # generated at import, so a type checker sees no members
_Piece = _pb2.ModelProto.SentencePiece
_TrainerSpec = _pb2.TrainerSpec


class HfTokenizer:
    """One SentencePiece model, ready to be written beside an exported model."""

    def __init__(self, path: Path | str, *, vocab_size: int, seq_len: int) -> None:
        """Reads the model; writes nothing.

        Args:
            path: a SentencePiece `.model` file.
            vocab_size: rows of the model's embedding.
            seq_len: the model's context, in tokens.

        Raises:
            ValueError: the file is no SentencePiece model, or it has more ids than the embedding has rows, or it is of
                a kind that `tokenizers` cannot represent.
        """
        self._path, self._seq_len = Path(path), seq_len
        self._bytes = self._path.read_bytes()
        try:
            processor = SentencePieceProcessor(model_proto=self._bytes)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}): give the .model file the data was tokenized with") from error
        self._proto = _pb2.ModelProto.FromString(self._bytes)
        self._pieces = list(self._proto.pieces)
        if len(self._pieces) > vocab_size:
            raise ValueError(
                f"{path} has {len(self._pieces)} ids, more than model.vocab_size={vocab_size}: "
                f"give the tokenizer that the model was trained with"
            )
        self._check_representable()
        ids = [None if token_id < 0 else token_id for token_id in (processor.bos_id(), processor.eos_id(), processor.pad_id())]
        self.special = SpecialIds(*ids)
        self._unk_id = processor.unk_id()

    def write(self, directory: Path) -> None:
        """Writes the three files, each whole or not at all."""
        write_durably(directory / "tokenizer.model", self._bytes)
        write_json(directory / "tokenizer.json", self.tokenizer_json())
        write_json(directory / "tokenizer_config.json", self.tokenizer_config())

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        named = {"bos_token": self.special.bos, "eos_token": self.special.eos, "unk_token": self._unk_id, "pad_token": self.special.pad}
        return {
            # The class that takes tokenizer.json as it is, in transformers 4 and 5.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: self._pieces[token_id].piece for name, token_id in named.items() if token_id is not None},
            "add_bos_token": self.special.bos is not None,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._seq_len,
            "model_input_names": ["input_ids", "attention_mask"],
        }

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of tokenizer.json: normalizer, model, decoder, and the BOS that every text begins with."""
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
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": self._normalizers()},
            "pre_tokenizer": None,
            "post_processor": self._post_processor(),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._bpe() if self._proto.trainer_spec.model_type == _TrainerSpec.BPE else self._unigram(),
        }

    def _check_representable(self) -> None:
        trainer, normalizer = self._proto.trainer_spec, self._proto.normalizer_spec
        problem = None
        if trainer.model_type not in (_TrainerSpec.BPE, _TrainerSpec.UNIGRAM):
            problem = f"model_type={_TrainerSpec.ModelType.Name(trainer.model_type)}: train it as bpe or unigram"
        elif trainer.treat_whitespace_as_suffix:
            problem = "treat_whitespace_as_suffix=true: train it with false"
        elif not normalizer.escape_whitespaces:
            problem = "escape_whitespaces=false: train it with true"
        if problem:
            raise ValueError(f"{self._path} cannot be written for transformers, its {problem}")

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
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": token_id, "content": piece.piece, **flags, "special": whole[piece.type]}
            for token_id, piece in enumerate(self._pieces)
            if piece.type in whole
        ]

    def _post_processor(self) -> dict[str, Any] | None:
        bos_id = self.special.bos
        if bos_id is None:
            return None
        bos = self._pieces[bos_id].piece
        first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        second: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, *second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        }

    def _unigram(self) -> dict[str, Any]:
        return {
            "type": "Unigram",
            "unk_id": self._unk_id,
            "vocab": [[piece.piece, piece.score] for piece in self._pieces],
            "byte_fallback": self._proto.trainer_spec.byte_fallback,
        }

    def _bpe(self) -> dict[str, Any]:
        """SentencePiece's BPE joins the adjacent pair whose result has the best score; here that is a ranked list of pairs."""
        ids = {piece.piece: token_id for token_id, piece in enumerate(self._pieces) if piece.type == _Piece.NORMAL}
        merges: list[tuple[float, int, str, str]] = []
        for text, token_id in ids.items():
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in ids and right in ids:
                    merges.append((-self._pieces[token_id].score, token_id, left, right))
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": self._pieces[self._unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": self._proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: token_id for token_id, piece in enumerate(self._pieces)},
            "merges": [[left, right] for _, _, left, right in sorted(merges, key=lambda merge: merge[:2])],
        }
