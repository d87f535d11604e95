"""Talks with a model in the terminal, or answers messages that are piped in: `python flows/generate.py CHECKPOINT --chat`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

from flows.generate import run_inference
from model.inference_jobs import ChatJob
from model.model_place import find_model
from tasks.bucket_runs import model_here
from tasks.chat import Conversation, find_template

CLEAR = "/clear"


def chat(checkpoint: str, template: Path | None, system: str | None, sampling: dict[str, Any]) -> int:
    """Holds a conversation until standard input ends; returns the exit status.

    Raises:
        ValueError: there is no model, or no template that can be used; with the remedy.
    """
    place = find_model(model_here(checkpoint))
    source, where = find_template(place, template)
    terminal = ChatTerminal(source, where, system)
    return run_inference("model.chat", ChatJob(model=place, **sampling), terminal.on_event, terminal.on_start)


class ChatTerminal:
    """Messages from standard input, a line each, and the answers on standard output."""

    def __init__(self, template: str, source: str, system: str | None) -> None:
        self._template, self._source, self._system = template, source, system
        self._conversation: Conversation | None = None
        self._to_model: IO[str] | None = None
        self._prompted = sys.stdin.isatty()

    def on_start(self, to_model: IO[str]) -> None:
        """Takes the input of the chat process."""
        self._to_model = to_model

    def on_event(self, event: dict[str, Any]) -> None:
        """Shows one event of the chat process and, when it waits, asks for the next message."""
        kind = event["event"]
        if kind == "ready":
            tokens = {key: event[key] for key in ("special_tokens", "bos_id", "eos_id")}
            self._conversation = Conversation(self._template, self._source, system=self._system, **tokens)
            if self._prompted:
                print(f"Type a message; {CLEAR} begins anew, Ctrl-D ends.", file=sys.stderr)
        elif kind == "text":
            print(event["text"], end="", flush=True)
        elif kind in ("end", "refused"):
            assert self._conversation is not None
            if kind == "end":
                print(flush=True)
                self._conversation.answered(event["text"])
            else:
                print(f"error: {event['message']}", file=sys.stderr)
                self._conversation.take_back()
        if kind in ("ready", "end", "refused"):
            self._next()

    def _next(self) -> None:
        """Sends the next message, or closes the conversation where there is none."""
        assert self._conversation is not None
        assert self._to_model is not None
        while (line := self._line()) is not None:
            if line == CLEAR:
                self._conversation.clear()
            elif line:
                try:
                    asked = self._conversation.ask(line)
                except ValueError as error:
                    self._conversation.take_back()
                    print(f"error: {error}", file=sys.stderr)
                    continue
                self._to_model.write(json.dumps(asked) + "\n")
                self._to_model.flush()
                return
        self._to_model.close()

    def _line(self) -> str | None:
        """The next line of input, stripped; None at its end."""
        if self._prompted:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.strip() if line else None
