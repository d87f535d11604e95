"""The completion process: `python -m model.completion JOB.json` goes on from prompts and says the text as it is made.

On standard output, one JSON line each: `{"event": "text", "prompt": INDEX, "text": MORE}` for what is new of one continuation, and
`{"event": "end", "prompt": INDEX, "tokens": COUNT, "stopped": BOOL}` at its end, one prompt after the other. All prompts are continued
at once; what is made of a later one meanwhile is said when its turn comes.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from model.child import die_with_parent, emit, exit_status
from model.generate import stream
from model.inference_jobs import CompletionJob
from model.trained_model import TrainedModel
from model.vocabularies.vocabulary import Vocabulary

BLOCK = 8  # tokens between two looks at what was made: a person reads no faster, and each look waits for the devices
DEFAULT_NEW_TOKENS = 128
UNFINISHED = "\ufffd"  # what decoders put where bytes are no character, or none yet


class Continuation:
    """The text of one row as it grows: nothing that was said is ever taken back, and no character is said in halves."""

    def __init__(self, vocabulary: Vocabulary, prompt_ids: list[int], max_new_tokens: int, stops: Collection[int] = ()) -> None:
        """`stops`: ids that end the text besides EOS."""
        self._stops = {vocabulary.eos_id, *stops}
        self._vocabulary, self._prompt_ids, self._max_new_tokens = vocabulary, prompt_ids, max_new_tokens
        self._said = len(vocabulary.decode(prompt_ids))
        self.ids: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether the model ended the text itself."""
        return bool(self.ids) and self.ids[-1] in self._stops

    @property
    def ended(self) -> bool:
        """Whether no more ids come."""
        return self.stopped or len(self.ids) == self._max_new_tokens

    def more(self) -> str:
        """What can be said since the last call. Bytes at the end that are no character wait for what follows, if anything does."""
        # from the beginning each time: what an id is as text depends on those before it
        text = self._vocabulary.decode(self._prompt_ids + self.ids)
        new = (text if self.ended else text.rstrip(UNFINISHED))[self._said :]
        self._said += len(new)
        return new


def complete(job: CompletionJob) -> Iterator[dict[str, Any]]:
    """The events of one job, as they come; `generate` with the same arguments gives the same tokens.

    Raises:
        ValueError: there is no model at the place, a prompt is empty or too long, or the tokenizer is not to be found.
    """
    for index, prompt in enumerate(job.prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: give some text to go on from")
    model = TrainedModel.open(job.model)
    encoded = [model.prompt_ids(prompt) for prompt in job.prompts]
    max_new_tokens = _room(job, encoded, model.config.seq_len)
    rows = [Continuation(model.vocabulary, ids, max_new_tokens) for ids in encoded]
    blocks = stream(
        model.params,
        model.config,
        encoded,
        block=BLOCK,
        max_new_tokens=max_new_tokens,
        temperature=job.temperature,
        top_p=job.top_p,
        seed=job.seed,
        eos_id=model.vocabulary.eos_id,
        num_ids=model.vocabulary.vocab_size,
    )
    turn = 0
    for block in blocks:
        for row, ids in zip(rows, block, strict=True):
            row.ids += ids
        while turn < len(rows):
            if text := rows[turn].more():
                yield {"event": "text", "prompt": turn, "text": text}
            if not rows[turn].ended:
                break
            yield {"event": "end", "prompt": turn, "tokens": len(rows[turn].ids), "stopped": rows[turn].stopped}
            turn += 1


def _room(job: CompletionJob, encoded: list[list[int]], seq_len: int) -> int:
    """How many tokens to make. Raises ValueError where a prompt leaves no room for those that were asked for."""
    longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
    room, asked = seq_len - len(encoded[longest]), job.max_new_tokens
    if room < (asked or 1):
        raise ValueError(
            f"prompt {longest + 1} has {len(encoded[longest])} tokens, which leaves room for {max(room, 0)} more in the model's context of "
            f"{seq_len}" + (f", and max_new_tokens={asked}: lower it, or shorten the prompt" if asked and room > 0 else ": shorten it")
        )
    return asked or min(DEFAULT_NEW_TOKENS, room)


def main(job_file: Path) -> int:
    """Runs one job; returns the exit status."""
    die_with_parent()
    return exit_status(lambda: _complete(job_file))


def _complete(job_file: Path) -> None:
    for event in complete(CompletionJob.model_validate_json(job_file.read_text(encoding="utf-8"))):
        emit(event.pop("event"), **event)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m model.completion JOB.json")
    sys.exit(main(Path(sys.argv[1])))
