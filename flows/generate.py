"""Goes on from a text with any trained model, and shows it as it is made.

    python flows/generate.py artifacts/checkpoints/debug-2b2e... "To be, or not to be"
    python flows/generate.py artifacts/checkpoints/debug-2b2e.../hf "Once" "Twice" --greedy
    python flows/generate.py artifacts/checkpoints/mine-91c3... --chat

Exit status: 0 done, 1 it broke, 2 the request was wrong, 130 stopped on request.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts flows/ first on the path; the packages are siblings of it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import tempfile
from collections.abc import Callable
from typing import IO, Any

import tyro

from flows.command_line import named_errors
from flows.flag_errors import parse_flags
from model.durable import write_json
from model.inference_jobs import ChatJob, CompletionJob
from model.model_place import find_model
from tasks.bucket_runs import model_here
from tasks.children import ChildFailed, run_child


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to go on from, and how."""

    checkpoint: tyro.conf.Positional[str]
    """A run's directory (in a bucket, a finished run's), one of its checkpoints/<step>, or a directory with a Hugging Face Llama."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """The texts; each is continued on its own."""
    chat: bool = False
    """Talk with the model, by its tokenizer's chat template: each line typed, or piped in, is one message."""
    chat_template: Path | None = None
    """A file with the template (Jinja, as Hugging Face tokenizers have it), where the tokenizer has none or another is meant."""
    system: str | None = None
    """What the conversation begins with, for the model alone; with --chat."""
    max_new_tokens: int | None = None
    """Longest continuation; unset: 128, of an answer 256, or what the model's context has room for."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens that holds this probability; 1 is all."""
    greedy: bool = False
    """Always take the likeliest token: temperature 0."""
    seed: int = 0
    """Of the sampling; the same seed gives the same text."""


class Terminal:
    """Prompts and what follows them, on standard output."""

    def __init__(self, prompts: tuple[str, ...]) -> None:
        self._prompts, self._begun = prompts, -1

    def on_event(self, event: dict[str, Any]) -> None:
        """Shows one event of the completion process."""
        if event["event"] == "error":
            return  # the caller says it
        if event["prompt"] != self._begun:
            self._begun = event["prompt"]
            print("\n" * (self._begun > 0) + self._prompts[self._begun], end="")
        print(event.get("text", "\n"), end="", flush=True)


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit status."""
    form = {"prog": "generate.py", "description": __doc__, "config": (tyro.conf.FlagCreatePairsOff,)}
    try:
        return named_errors(lambda: _complete(parse_flags(Arguments, arguments, **form)))
    except KeyboardInterrupt:
        return 130


def _complete(options: Arguments) -> int:
    if options.greedy and options.temperature not in (0, 0.8):
        raise ValueError(f"--greedy and --temperature={options.temperature} contradict each other: leave one of them out")
    sampling: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": 0.0 if options.greedy else options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    if options.chat:
        if options.prompts:
            raise ValueError(f"--chat takes no prompts (got {options.prompts[0]!r}): type your message when it asks, or pipe it in")
        from flows.chat import chat

        return chat(options.checkpoint, options.chat_template, options.system, sampling)
    for flag, value in (("--chat-template", options.chat_template), ("--system", options.system)):
        if value is not None:
            raise ValueError(f"{flag} has no effect without --chat: add that, or leave it out")
    if not options.prompts:
        raise ValueError("there is no prompt: give a text to go on from, or --chat to talk with the model")
    job = CompletionJob(model=find_model(model_here(options.checkpoint)), prompts=options.prompts, **sampling)
    return run_inference("model.completion", job, Terminal(options.prompts).on_event)


def run_inference(
    module: str, job: CompletionJob | ChatJob, on_event: Callable[[dict[str, Any]], None], on_start: Callable[[IO[str]], None] | None = None
) -> int:
    """Runs the process that uses a model; the exit status of this one."""
    with tempfile.TemporaryDirectory() as place:
        job_file = Path(place) / "job.json"
        write_json(job_file, job.model_dump(mode="json"))
        try:
            run_child(module, [str(job_file)], on_event, on_start=on_start)
        except ChildFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if error.named else 1
        except OSError as error:
            print(f"error: {error.strerror or error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
