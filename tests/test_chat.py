"""Chat: templates are found, rendered as in training, and end answers; the process answers; the terminal keeps the conversation."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.chat import ChatTerminal
from model.chat import Until, answer
from model.config import LlamaConfig
from model.inference_jobs import ChatJob
from model.partitioning import make_mesh
from model.trained_model import TrainedModel
from model.vocabularies.vocabulary import Vocabulary
from tasks.chat import TEMPLATE_FILE, Conversation, find_template
from tasks.config import TrainingStep
from tasks.data_steps import Tokenization
from tasks.export import chat_template_of
from tasks.mixture_config import Chat
from tasks.readers.chat_template import DEFAULT_TEMPLATE
from tasks.steps import Step
from tests.small_run import SmallRun
from tests.trained_run import MODEL, TRAIN, trained_run

CHECKOUT = Path(__file__).resolve().parent.parent
SPECIAL = {"<s>": 1, "</s>": 2, "<|start|>": 3, "<|end|>": 4}
# No generation block, as most tokenizers of the hub have none.
TURNS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def conversation(template: str, **changes: Any) -> Conversation:
    return Conversation(template, "the template", **{"special_tokens": SPECIAL, "bos_id": 1, "eos_id": 2, **changes})


def test_the_model_is_asked_as_the_template_writes_the_conversation() -> None:
    talk = conversation(TURNS, system="Be brief.")
    asked = talk.ask("a <|end|> in a message is text")
    assert asked["pieces"] == [
        ("", 1),
        *[("", 3), ("system\nBe brief.", None), ("", 4), ("\n", None)],
        *[("", 3), ("user\na <|end|> in a message is text", None), ("", 4), ("\n", None)],
        *[("", 3), ("assistant\n", None)],
    ]
    assert (asked["stops"], asked["stop_text"]) == ([2, 4], None)
    talk.answered("Yes.")
    second = talk.ask("And?")
    assert second["pieces"][: len(asked["pieces"]) - 1] == asked["pieces"][:-1]
    assert [text for text, _ in second["pieces"]][-8:] == ["", "assistant\nYes.", "", "\n", "", "user\nAnd?", "", "\n", "", "assistant\n"][
        -8:
    ]
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_template_of_plain_text_ends_answers_by_text_and_begins_with_bos() -> None:
    talk = conversation(DEFAULT_TEMPLATE)
    asked = talk.ask("hello")
    assert asked == {"pieces": [("", 1), ("user: hello\nassistant: ", None)], "stops": [2], "stop_text": "\nuser: "}


def test_a_template_that_takes_no_second_question_ends_with_eos_alone() -> None:
    template = "{% if messages|length > 2 %}{{ raise_exception('one question only') }}{% endif %}{{ messages[0]['content'] }}"
    talk = conversation(template)
    assert talk.ask("hello")["stops"] == [2]
    talk.answered("yes")
    with pytest.raises(ValueError, match=r"the template does not take a conversation \(one question only"):
        talk.ask("again")
    with pytest.raises(ValueError, match="the template line 1 is no Jinja"):
        conversation("{% for %}")


def test_templates_are_found_where_tokenizers_have_them(tmp_path: Path) -> None:
    run, export = tmp_path / "mine-0123456789abcdef", tmp_path / "mine-0123456789abcdef" / "hf"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    place = run / "checkpoints" / "4"
    (export / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    for where in (place, export):
        with pytest.raises(ValueError, match="no chat template: give one with --chat-template FILE"):
            find_template(where, None)
    (export / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "a"}]}))
    assert find_template(export, None)[0] == "a"
    (export / "tokenizer_config.json").write_text(json.dumps({"chat_template": "b"}))
    assert find_template(place, None)[0] == "b"
    (export / TEMPLATE_FILE).write_text("c")
    assert find_template(place, None) == ("c", str(export / TEMPLATE_FILE))
    (tmp_path / "own.jinja").write_text("d")
    assert find_template(place, tmp_path / "own.jinja")[0] == "d"
    with pytest.raises(ValueError, match=r"--chat-template=.*none.jinja cannot be read"):
        find_template(place, tmp_path / "none.jinja")


def test_an_export_has_the_template_of_the_conversations_it_was_trained_on(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)

    def template(*answers: Chat | None) -> str | None:
        reading = small.mixture.datasets[0].reading
        readings = [reading.model_copy(update={"answers": one, "format": "jsonl"}) for one in answers]
        tokens = [replace(small.tokens, name=f"t{number}", config=Tokenization(reading=one)) for number, one in enumerate(readings)]
        mixture = replace(small.steps.mixture, upstream=(small.steps.tokenizer, *tokens))
        return chat_template_of(Step(kind="checkpoints", name="m", config=TrainingStep(model=MODEL, train=TRAIN), upstream=(mixture,)))

    assert template(None) is None
    assert template(None, Chat()) == DEFAULT_TEMPLATE
    assert template(Chat(template=TURNS), Chat(template=TURNS)) == TURNS
    assert template(Chat(template=TURNS), Chat()) is None


@pytest.mark.parametrize("cuts", [(3, 9, 12), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), ()])
def test_text_ends_before_what_ends_it_however_it_comes(cuts: tuple[int, ...]) -> None:
    whole = "a\n b\nuser: c\n"
    for stop, expected in (("\nuser: ", "a\n b"), ("\nnobody: ", whole), (None, whole)):
        until, said = Until(stop), ""
        for start, end in zip((0, *cuts), (*cuts, len(whole)), strict=True):
            said += until.more(whole[start:end], last=end == len(whole))
            if until.found:
                break
        assert (said, until.found) == (expected, expected != whole)


def test_an_answer_ends_with_the_token_or_text_that_the_template_ends_it_with(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Vocabulary.open_bytes()
    config = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=48, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=400)
    model = TrainedModel(Path("tiny"), config, {}, vocabulary, make_mesh())
    made = vocabulary.encode("Yes.\nuser: no").tolist()
    prompts: list[list[int]] = []

    def blocks(params: Any, config: Any, ids: list[list[int]], *, max_new_tokens: int, **settings: Any) -> Iterator[list[list[int]]]:
        prompts.extend(ids)
        yield from ([made[start : min(start + 3, max_new_tokens)]] for start in range(0, max_new_tokens, 3))

    monkeypatch.setattr("model.chat.stream", blocks)

    def answered(max_new_tokens: int = 12, **changes: Any) -> tuple[str, int, bool]:
        asked = {"pieces": [("", vocabulary.eos_id), ("user: hi", None)], "stops": [], "stop_text": None, **changes}
        events = list(answer(model, ChatJob(model=Path("tiny"), max_new_tokens=max_new_tokens), asked, 0))
        assert "".join(event["text"] for event in events[:-1]) == events[-1]["text"]
        return events[-1]["text"], events[-1]["tokens"], events[-1]["stopped"]

    assert answered() == ("Yes.\nuser: n", 12, False)
    assert prompts == [[vocabulary.eos_id, *vocabulary.encode("user: hi").tolist()]]
    assert answered(stops=[made[3]])[1:] == (4, True)
    assert answered(stop_text="\nuser: ") == ("Yes.", 12, True)
    assert answered(max_new_tokens=5) == ("Yes.\n", 5, False)
    with pytest.raises(ValueError, match=r"has 80 tokens, the model's context is 64: /clear"):
        answered(pieces=[("x" * 80, None)])


def test_the_terminal_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nlonger\nagain\n/clear\nanew\n"))
    sent: list[list[str]] = []

    class ToModel(io.StringIO):
        def write(self, text: str) -> int:
            sent.append([text for text, token in json.loads(text)["pieces"] if token is None])
            return len(text)

    to_model = ToModel()
    terminal = ChatTerminal(DEFAULT_TEMPLATE, "the template", None)
    terminal.on_start(to_model)
    terminal.on_event({"event": "ready", "special_tokens": {}, "bos_id": None, "eos_id": 2})
    terminal.on_event({"event": "text", "text": "Hi."})
    terminal.on_event({"event": "end", "text": "Hi.", "tokens": 2, "stopped": True})
    terminal.on_event({"event": "refused", "message": "too long"})
    terminal.on_event({"event": "end", "text": "", "tokens": 1, "stopped": True})
    assert sent[0] == ["user: hello\nassistant: "]
    assert sent[1] == ["user: hello\nassistant: ", "Hi.\n", "user: longer\nassistant: "]
    assert sent[2] == ["user: hello\nassistant: ", "Hi.\n", "user: again\nassistant: "], "what was refused was not said"
    assert sent[3] == ["user: anew\nassistant: "]
    assert not to_model.closed
    terminal.on_event({"event": "end", "text": "", "tokens": 1, "stopped": True})
    assert to_model.closed
    shown = capsys.readouterr()
    assert shown.out == "Hi.\n\n\n"
    assert shown.err == "error: too long\n"


@pytest.mark.slow
def test_messages_are_piped_in_and_answered(tmp_path: Path) -> None:
    run = trained_run()
    template = tmp_path / "plain.jinja"
    template.write_text(DEFAULT_TEMPLATE)
    command = [sys.executable, str(CHECKOUT / "flows" / "generate.py"), str(run.directory), "--chat", "--max-new-tokens", "8"]
    refused = subprocess.run(command, input="hello\n", capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--chat-template FILE" in refused.stderr
    told = {"input": "hello\nagain\n", "capture_output": True, "text": True, "check": True}
    first = subprocess.run([*command, "--chat-template", str(template), "--greedy"], **told)
    assert len(first.stdout.splitlines()) >= 2
    assert subprocess.run([*command, "--chat-template", str(template), "--greedy"], **told).stdout == first.stdout
