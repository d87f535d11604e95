"""Turns records of JSON into documents: the text of one key, or questions and answers in one canonical form.

JSON is what orjson takes: UTF-8, no NaN or Infinity, at most 1,024 levels deep, and the last one of equal keys counts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from tasks.mixture_config import Chat, PromptCompletion, Reading
from tasks.readers.json_values import json_values
from tasks.readers.line_blocks import BadDocument, has_nul, in_words, line_blocks, not_utf8

# Longer records are looked at before they are parsed: an empty list of two bytes takes some seventy when parsed.
_LARGE = 1 << 20
_MAX_BRACKETS = 1_000_000


class BadRecord(Exception):
    """A record without a usable document: why in one word, what is wrong, what to do."""

    def __init__(self, reason: str, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.reason, self.what, self.remedy = reason, what, remedy

    def at(self, where: str) -> BadDocument:
        """The same with its place."""
        return BadDocument(self.reason, where, self.what, self.remedy)


def document_extractor(reading: Reading) -> Callable[[Any], str]:
    """A function from a parsed record to its document; "" where there is nothing to learn. It raises BadRecord.

    With `answers` the document is JSON with sorted keys and no spaces: {"completion": str, "prompt": str}, or a list of
    {"content": str, "role": str}.
    """
    answers = reading.answers
    if isinstance(answers, PromptCompletion):
        return lambda record: _prompt_and_completion(record, answers)
    if isinstance(answers, Chat):
        return lambda record: _conversation(record, answers)
    key = reading.text_key
    if "." in key:
        return lambda record: checked_text(_value(record, key), key)

    def _text(record: Any) -> str:
        try:
            text = record[key]
        except (KeyError, TypeError, IndexError):
            text = _value(record, key)
        return text if type(text) is str and "\0" not in text else checked_text(text, key)

    return _text


def checked_text(value: Any, key: str) -> str:
    """The value as text; bytes are decoded as UTF-8. Raises BadRecord: null, not_text, undecodable, nul."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            what = f"{key!r} has byte 0x{value[error.start]:02x} at {error.start}, which is not UTF-8 ({error.reason})"
            raise BadRecord("undecodable", what, "convert the text to UTF-8") from None
    if value is None:
        raise BadRecord("null", f"{key!r} is null, not a string", "correct the record")
    if not isinstance(value, str):
        raise BadRecord("not_text", f"{key!r} is {type(value).__name__}, not a string", "correct the record")
    if "\0" in value:
        raise BadRecord("nul", f"{key!r} has a NUL character at {value.index(chr(0))}", "remove the character")
    return value


def _value(record: Any, key: str, remedy: str = "set text_key to the key that holds the text") -> Any:
    """The value below a dotted key; None where an object on the way is null."""
    found = record
    for part in key.split("."):
        if found is None and found is not record:
            return None
        if not isinstance(found, dict) or part not in found:
            has = f"an object with the keys {sorted(found)[:8]}" if isinstance(found, dict) else f"a JSON {type(found).__name__}"
            raise BadRecord("missing_key", f"no key {key!r}, but {has}", remedy)
        found = found[part]
    return found


def _canonical(value: dict[str, str] | list[dict[str, str]]) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _prompt_and_completion(record: Any, answers: PromptCompletion) -> str:
    prompt = checked_text(_value(record, answers.prompt_key, "set answers.prompt_key"), answers.prompt_key)
    completion = checked_text(_value(record, answers.completion_key, "set answers.completion_key"), answers.completion_key)
    if not completion or completion.isspace():
        return ""
    return _canonical({"completion": completion, "prompt": prompt})


def _conversation(record: Any, answers: Chat) -> str:
    key = answers.messages_key
    messages = _value(record, key, "set answers.messages_key to the key that holds the messages")
    if messages is None:
        raise BadRecord("null", f"{key!r} is null, not a list", "correct the record")
    if not isinstance(messages, list):
        raise BadRecord("not_text", f"{key!r} is {type(messages).__name__}, not a list of messages", "correct the record")
    turns: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        turn: dict[str, str] = {}
        for part in ("content", "role"):
            name = f"{key}[{number}].{part}"
            if not isinstance(message, dict) or part not in message:
                has = f"the keys {sorted(message)[:8]}" if isinstance(message, dict) else f"a {type(message).__name__}"
                raise BadRecord("missing_key", f"no {name!r}, but {has}", 'messages are {"role": ..., "content": ...}: convert them')
            turn[part] = checked_text(message[part], name)
        turns.append(turn)
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not said:
        roles = sorted({turn["role"] for turn in turns})
        raise BadRecord("no_answer", f"{key!r} has no turn of the role 'assistant', but {roles}", "there is nothing to learn from it")
    return _canonical(turns) if any(text and not text.isspace() for text in said) else ""


def jsonl_documents(stream: io.BufferedReader, path: Path, reading: Reading) -> Iterator[str | BadDocument]:
    """The documents of a stream with one record a line; "" for each blank line."""
    extract, loads = document_extractor(reading), orjson.loads
    for block in line_blocks(stream, path, reading.max_document_bytes):
        if isinstance(block, BadDocument):
            yield block
            continue
        for index, line in enumerate(block.lines):
            if len(line) > _LARGE and (bad := _too_many(line)) is not None:
                yield bad.at(block.where(index))
                continue
            try:
                document = extract(loads(line))
            except BadRecord as bad:
                document = bad.at(block.where(index))
            except orjson.JSONDecodeError as error:
                document = "" if not line or line.isspace() else _explained(error, line, path, block.place(index))
            yield document


def json_documents(stream: io.BufferedReader, path: Path, reading: Reading) -> Iterator[str | BadDocument]:
    """The documents of a stream with a list of records, or records one after the other."""
    extract, loads = document_extractor(reading), orjson.loads
    for value in json_values(stream, path, reading.max_document_bytes):
        if isinstance(value, BadDocument):
            yield value
        elif len(value.data) > _LARGE and (bad := _too_many(value.data)) is not None:
            yield bad.at(value.where)
        else:
            try:
                document = extract(loads(value.data))
            except BadRecord as bad:
                document = bad.at(value.where)
            except orjson.JSONDecodeError as error:
                document = replace(_explained(error, value.data, path, (1, value.offset)), where=value.where)
            yield document


def _too_many(data: bytes) -> BadRecord | None:
    """A record of so many brackets that it would take some thirty times its size in memory, or None."""
    if (brackets := data.count(b"[") + data.count(b"{")) <= _MAX_BRACKETS:
        return None
    return BadRecord("bad_json", f"{brackets:,} brackets in one record, {_MAX_BRACKETS:,} are allowed", "split the record")


def _explained(error: orjson.JSONDecodeError, data: bytes, path: Path, place: tuple[int, int]) -> BadDocument:
    """What is wrong with the bytes of a record, or else with its JSON. place: the line and byte where they begin."""
    try:
        data.decode()
    except UnicodeDecodeError as undecodable:
        return not_utf8(undecodable, path, *place)
    if b"\0" in data:
        return has_nul(data, path, *place)
    where = in_words(path, *place)
    if "surrogate" in error.msg:
        return BadDocument("undecodable", where, f"half a surrogate pair before character {error.pos}", "correct the record")
    return BadDocument("bad_json", where, f"not a JSON value ({str(error)[:120]})", "correct the record")
