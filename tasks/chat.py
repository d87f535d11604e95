"""A conversation with a model by its tokenizer's chat template, rendered as training data is (`tasks.readers.chat_template`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.model_place import is_hf
from tasks.bucket_runs import EXPORT
from tasks.readers.chat_template import Piece, UnusableConversation, render_conversation
from tasks.readers.conversation import with_beginning
from tasks.sources import DataError

TEMPLATE_FILE = "chat_template.jinja"  # as transformers names it
TOKENIZER_CONFIG = "tokenizer_config.json"
_QUESTION, _ANSWER, _NEXT = "QuestionOfTheUser", "AnswerOfTheAssistant", "NextOfTheUser"


def find_template(place: Path, given: Path | None) -> tuple[str, str]:
    """The chat template for the model at `place`, and where it is: the given file, or that of the Hugging Face directory or run.

    Raises:
        ValueError: there is none; with the remedy.
    """
    if given is not None:
        try:
            return given.read_text(encoding="utf-8"), f"--chat-template={given}"
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template={given} cannot be read ({error}): give a text file with the template") from None
    directory = place if is_hf(place) else place.parent.parent / EXPORT
    if (file := directory / TEMPLATE_FILE).is_file():
        return file.read_text(encoding="utf-8"), str(file)
    config = directory / TOKENIZER_CONFIG
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # several by name, as some tokenizers have them
        found = {one["name"]: one["template"] for one in found}.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"the tokenizer of {place} has no chat template: give one with --chat-template FILE, Jinja as Hugging Face tokenizers have it. "
            "A model that saw no conversations in training does not answer questions"
        )
    return found, str(config)


@dataclass
class Conversation:
    """What was said so far, and how the model is asked for the next answer."""

    template: str
    source: str  # where the template is, for errors
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begins; a template that cannot be used is refused now. Raises ValueError."""
        self.clear()
        self._stops, self._stop_text = self._ends()

    def clear(self) -> None:
        """Begins anew, with what the system says."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> dict[str, Any]:
        """What the chat process is told after the user said `text`, which is now part of the conversation. Raises ValueError."""
        self.messages.append({"role": "user", "content": text})
        pieces = with_beginning(self._rendered(self.messages, add_generation_prompt=True), self.bos_id)
        return {"pieces": [(piece.text, piece.token) for piece in pieces], "stops": self._stops, "stop_text": self._stop_text}

    def answered(self, text: str) -> None:
        """The model's answer becomes part of the conversation."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """The last message was not answered, so it is as if it had not been said."""
        self.messages.pop()

    def _rendered(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[Piece]:
        options: dict[str, Any] = {"for_training": False, "add_generation_prompt": add_generation_prompt}
        try:
            return render_conversation(messages, self.template, self.special_tokens, self.bos_id, self.eos_id, **options)
        except DataError as error:
            raise ValueError(str(error).replace("answers.template", self.source)) from None

    def _ends(self) -> tuple[list[int], str | None]:
        """What ends an answer: EOS and the control token that the template writes after one, or else the text that it writes there."""
        said = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT)]
        try:
            pieces = self._rendered([{"role": role, "content": text} for role, text in said], add_generation_prompt=False)
        except ValueError as error:
            if isinstance(error.__context__, UnusableConversation):
                return [self.eos_id], None  # it takes no such conversation; one that it takes is answered until EOS
            raise
        between = ""
        for piece in pieces[next((i for i, piece in enumerate(pieces) if _ANSWER in piece.text), len(pieces)) :]:
            if piece.token is not None and not between.strip():
                return sorted({self.eos_id, piece.token}), None
            between += piece.text.partition(_ANSWER)[2] if _ANSWER in piece.text else piece.text
            if _NEXT in between or piece.token is not None:
                break
        text = between.partition(_NEXT)[0]
        return [self.eos_id], text if text.strip() else None
