"""The chat process: `python -m model.chat JOB.json` answers conversations, one a line of standard input, as it goes.

A line: `{"pieces": [[TEXT, TOKEN or null], ...], "stops": [IDS], "stop_text": TEXT or null}`: the conversation as its template
writes it, and what ends the answer besides EOS. On standard output, a JSON line each: first `{"event": "ready", "special_tokens":
{TEXT: ID}, "bos_id": ID or null, "eos_id": ID}`, then of each answer `{"event": "text", "text": MORE}` and `{"event": "end",
"text": ALL, "tokens": COUNT, "stopped": BOOL}`, or `{"event": "refused", "message": ...}`. It ends with its input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.child import die_with_parent, emit, exit_status
from model.completion import BLOCK, Continuation
from model.generate import stream
from model.inference_jobs import ChatJob
from model.trained_model import TrainedModel

DEFAULT_NEW_TOKENS = 256


class Until:
    """A text that comes in parts, up to a text that ends it; of what may be the beginning of that, nothing is said before it is known."""

    def __init__(self, stop: str | None) -> None:
        self._stop, self._text, self._said = stop, "", 0
        self.found = False

    def more(self, new: str, *, last: bool) -> str:
        """What can be said now, after `new` has come; `last`: nothing more comes."""
        self._text += new
        end = len(self._text)
        if self._stop:
            at = self._text.find(self._stop)
            self.found = at >= 0
            held = 0 if last else next((n for n in range(len(self._stop) - 1, 0, -1) if self._text.endswith(self._stop[:n])), 0)
            end = at if self.found else end - held
        say = self._text[self._said : max(end, self._said)]
        self._said += len(say)
        return say


def answer(model: TrainedModel, job: ChatJob, asked: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """The events of one answer.

    Raises:
        ValueError: the conversation is too long for the model's context.
    """
    ids = piece_ids(model, asked["pieces"])
    room = model.config.seq_len - len(ids)
    if room < 1:
        raise ValueError(f"the conversation has {len(ids)} tokens, the model's context is {model.config.seq_len}: /clear begins a new one")
    most = min(job.max_new_tokens or DEFAULT_NEW_TOKENS, room)
    row, until, said, stops = Continuation(model.vocabulary, ids, most, asked["stops"]), Until(asked["stop_text"]), "", set(asked["stops"])
    blocks = stream(
        model.params,
        model.config,
        [ids],
        block=BLOCK,
        max_new_tokens=most,
        temperature=job.temperature,
        top_p=job.top_p,
        seed=seed % 2**32,
        eos_id=model.vocabulary.eos_id,
        num_ids=model.vocabulary.vocab_size,
    )
    for block in blocks:
        for token in block[0]:
            row.ids.append(token)
            if token in stops:
                break
        if text := until.more(row.more(), last=row.ended):
            said += text
            yield {"event": "text", "text": text}
        if row.ended or until.found:
            break
    yield {"event": "end", "text": said, "tokens": len(row.ids), "stopped": row.stopped or until.found}


def piece_ids(model: TrainedModel, pieces: list[tuple[str, int | None]]) -> list[int]:
    """The ids of a rendered conversation: its texts encoded each on its own, its control tokens as they are."""
    return [
        one for text, token in pieces for one in ([token] if token is not None else model.vocabulary.encode(text).tolist() if text else [])
    ]


def main(job_file: Path) -> int:
    """Answers until standard input ends; returns the exit status."""
    die_with_parent()
    return exit_status(lambda: _converse(job_file))


def _converse(job_file: Path) -> None:
    job = ChatJob.model_validate_json(job_file.read_text(encoding="utf-8"))
    model = TrainedModel.open(job.model)
    vocabulary = model.vocabulary
    emit("ready", special_tokens=vocabulary.special_tokens, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id)
    for turn, line in enumerate(sys.stdin):
        try:
            for event in answer(model, job, json.loads(line), job.seed + turn):
                emit(event.pop("event"), **event)
        except ValueError as error:
            emit("refused", message=str(error))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m model.chat JOB.json")
    sys.exit(main(Path(sys.argv[1])))
