"""Questions with answers as token ids, and which of them count in the loss: what the model itself is to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import orjson

from tasks.mixture_config import Chat, PromptCompletion
from tasks.readers.chat_template import Piece, render_conversation


class AnswerVocabulary(Protocol):
    """What is asked of a vocabulary here. `encode` adds no BOS or EOS and takes all of its text as plain text."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a document, where there is one."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens: text, as templates write it, to id."""
        ...

    def encode(self, text: str, /) -> np.ndarray:
        """Ids, integers [N], of plain text."""
        ...

    def check_length(self, text: str, /) -> None:
        """Raises a ValueError for a text that cannot be encoded in bounded memory."""
        ...


def encode_answers(document: str, answers: PromptCompletion | Chat, vocabulary: AnswerVocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a document, int64 [N], and bool [N]: True where the token, as a target, counts in the loss.

    document: what read_documents gives for these answers, a JSON object with "prompt" and "completion" or a list of messages.
    BOS, where the vocabulary has one, comes first and EOS last; neither is doubled where a template has written it, and white
    space before that BOS or after that EOS is left out. A text is cut where learning begins or ends and its parts are encoded
    apart, so the prompt's ids are those that it has alone, as when the model is asked.
    The EOS that ends the document counts where what is before it does. A template's own EOS counts where it lies in a
    `{% generation %}` block.
    Raises DataError for a template that cannot be used, UnusableConversation for a conversation that it refuses, and what the
    vocabulary's check_length raises.
    """
    record = orjson.loads(document)
    if isinstance(answers, PromptCompletion):
        pieces = [Piece(record["prompt"] + answers.separator, None, False), Piece(record["completion"], None, True)]
    else:
        pieces = render_conversation(record, answers.template, vocabulary.special_tokens, vocabulary.bos_id, vocabulary.eos_id)
    return _encoded(_with_ends(pieces, vocabulary), vocabulary)


def _with_ends(pieces: list[Piece], vocabulary: AnswerVocabulary) -> list[Piece]:
    """The pieces from BOS to EOS."""
    bos_id, eos_id = vocabulary.bos_id, vocabulary.eos_id
    written = [index for index, piece in enumerate(pieces) if piece.token is not None]
    if written and pieces[written[-1]].token == eos_id and _is_blank(pieces[written[-1] + 1 :]):
        pieces = pieces[: written[-1] + 1]
    else:
        pieces = [*pieces, Piece("", eos_id, bool(pieces) and pieces[-1].is_learned)]
    return with_beginning(pieces, bos_id)


def with_beginning(pieces: list[Piece], bos_id: int | None) -> list[Piece]:
    """The pieces with BOS first, where there is one: the template's own, or else one put there."""
    written = [index for index, piece in enumerate(pieces) if piece.token is not None]
    if bos_id is None:
        return pieces
    if written and pieces[written[0]].token == bos_id and _is_blank(pieces[: written[0]]):
        return pieces[written[0] :]
    return [Piece("", bos_id, False), *pieces]


def _is_blank(pieces: Iterable[Piece]) -> bool:
    return all(piece.token is None and piece.text.isspace() for piece in pieces)


def _encoded(pieces: list[Piece], vocabulary: AnswerVocabulary) -> tuple[np.ndarray, np.ndarray]:
    ids: list[np.ndarray] = []
    for piece in pieces:
        if piece.token is not None:
            ids.append(np.array([piece.token], np.int64))
        else:
            vocabulary.check_length(piece.text)
            ids.append(np.asarray(vocabulary.encode(piece.text) if piece.text else [], np.int64))
    return np.concatenate(ids), np.repeat([piece.is_learned for piece in pieces], [len(part) for part in ids])
