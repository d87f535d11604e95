"""Records: dotted keys, questions and answers in canonical form, JSON in lists and one after the other, and what is bad about them."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.mixture_config import Reading
from tasks.readers import json_values
from tasks.readers.json_values import JsonValue
from tasks.readers.line_blocks import BadDocument, Block, line_blocks
from tasks.readers.text_reader import Skipped, read_documents
from tasks.sources import DataError

CHAT = {"answers": {"kind": "chat"}}
PROMPT = {"answers": {"kind": "prompt_completion"}}


def read(path: Path, data: bytes, **fields: object) -> list[str]:
    path.write_bytes(data)
    return list(read_documents(path, Reading.model_validate(fields)))


def skip(path: Path, data: bytes, **fields: object) -> tuple[list[str], dict[str, int]]:
    path.write_bytes(data)
    skipped: Counter[str] = Counter()
    found = list(read_documents(path, Reading.model_validate({**fields, "on_bad_document": "skip"}), skipped))
    return found, dict(skipped)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.json"


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_a_dotted_key_descends(jsonl: Path) -> None:
    data = lines(
        {"meta": {"text": "a"}}, {"meta": {}}, {"meta": None}, {"meta": "text"}, {"meta": {"text": None}}, {"meta.text": "b"}, None
    )
    assert skip(jsonl, data, text_key="meta.text") == (["a"], {"missing_key": 4, "null": 2})
    with pytest.raises(DataError, match=r"line 2 \(byte 24\): no key 'meta\.text', but an object with the keys \[\]; set text_key"):
        read(jsonl, data, text_key="meta.text")


def test_the_last_of_equal_keys_counts_and_depth_and_size_are_bounded(jsonl: Path) -> None:
    assert read(jsonl, b'{"text": "a", "text": "b"}\n{"text": "c", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}") == ["b", "c"]
    deep = b'{"text": "d", "x": ' + b"[" * 1100 + b"]" * 1100 + b"}"
    assert skip(jsonl, deep) == ([], {"bad_json": 1})
    with pytest.raises(DataError, match="1,500,001 brackets in one record, 1,000,000 are allowed; split the record"):
        read(jsonl, b'{"text": "a", "x": [' + b"[]," * 1_499_998 + b"[]]}")


def test_prompts_and_completions_are_canonical_json(jsonl: Path) -> None:
    data = lines(
        {"prompt": "2+2\u00e9\n", "id": 1, "completion": '="4"'}, {"completion": " ", "prompt": "x"}, {"prompt": "", "completion": "y"}
    )
    found, skipped = skip(jsonl, data, **PROMPT)
    assert found == ['{"completion":"=\\"4\\"","prompt":"2+2\u00e9\\n"}', '{"completion":"y","prompt":""}']
    assert skipped == {"empty": 1}
    own = {"answers": {"kind": "prompt_completion", "prompt_key": "a.q", "completion_key": "a.r"}}
    assert read(jsonl, lines({"a": {"q": "1", "r": "2"}}), **own) == ['{"completion":"2","prompt":"1"}']


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ({"prompt": "a"}, "missing_key", r"no key 'completion', but an object with the keys \['prompt'\]; set answers.completion_key"),
        ({"prompt": 7, "completion": "a"}, "not_text", "'prompt' is int, not a string"),
        ({"prompt": "a", "completion": None}, "null", "'completion' is null"),
        ({"prompt": "a\0", "completion": "a"}, "nul", "'prompt' has a NUL character at 1"),
        ([1], "missing_key", "a JSON list"),
    ],
)
def test_bad_prompts_are_named(jsonl: Path, record: Any, reason: str, words: str) -> None:
    with pytest.raises(DataError, match=r"line 1 \(byte 0\): .*" + words):
        read(jsonl, lines(record), **PROMPT)
    assert skip(jsonl, lines(record), **PROMPT) == ([], {reason: 1})


def test_conversations_are_canonical_json(jsonl: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi \u263a", "name": "x"},
        {"content": "", "role": "system"},
        {"role": "assistant", "content": "Ho"},
    ]
    canonical = json.dumps([{"content": t["content"], "role": t["role"]} for t in turns], ensure_ascii=False, separators=(",", ":"))
    assert read(jsonl, lines({"messages": turns}), **CHAT) == [canonical]
    own = {"answers": {"kind": "chat", "messages_key": "data.turns"}}
    assert read(jsonl, lines({"data": {"turns": turns}}), **own) == [canonical]
    assert skip(jsonl, lines({"messages": [{"role": "assistant", "content": "\n"}]}), **CHAT) == ([], {"empty": 1})


@pytest.mark.parametrize(
    ("messages", "reason", "words"),
    [
        (None, "null", "'messages' is null, not a list"),
        ("hi", "not_text", "'messages' is str, not a list of messages"),
        ([{"role": "user"}], "missing_key", r"no 'messages\[0\]\.content', but the keys \['role'\]"),
        ([{"from": "human", "value": "x"}], "missing_key", r"the keys \['from', 'value'\]; messages are"),
        (["hi"], "missing_key", "but a str"),
        ([{"role": "user", "content": [{"type": "text"}]}], "not_text", r"'messages\[0\]\.content' is list"),
        ([{"role": None, "content": ""}], "null", r"'messages\[0\]\.role' is null"),
        ([{"role": "assistant", "content": "\0"}], "nul", "NUL character at 0"),
        ([{"role": "user", "content": "a"}], "no_answer", r"no turn of the role 'assistant', but \['user'\]"),
        ([], "no_answer", "no turn"),
    ],
)
def test_bad_conversations_are_named(jsonl: Path, messages: Any, reason: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(jsonl, lines({"messages": messages}), **CHAT)
    assert skip(jsonl, lines({"messages": messages}), **CHAT) == ([], {reason: 1})


RECORDS = [{"text": "a"}, {"text": 'b"[{\\', "x": [1, {"y": "]}"}]}, {"text": "c\nd"}]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "\n [" + " ,\t".join(map(json.dumps, RECORDS)) + "\n]\n\n",
        "\n".join(map(json.dumps, RECORDS)),
        "".join(map(json.dumps, RECORDS)),
        " \r\n\t".join(json.dumps(record, indent=1) for record in RECORDS) + "\n",
        "\ufeff" + json.dumps(RECORDS),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
def test_json_in_every_form(path: Path, data: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_PIECE_BYTES", piece)
    assert read(path, data.encode()) == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("data", [b"", b" \n", b"[]", b" [ \n] \n", b"\xef\xbb\xbf"])
def test_json_without_records_has_no_documents(path: Path, data: bytes) -> None:
    assert skip(path, data) == ([], {})


@pytest.mark.parametrize(
    ("data", "texts", "counts", "words"),
    [
        (b'[{"text": "a"}, 7, {"text": "b"}]', "ab", {"missing_key": 1}, r"record 2 \(byte 16\): no key 'text', but a JSON int"),
        (b'[{"text": "a"},, {"text": "b"}]', "ab", {"bad_json": 1}, r"record 2 .*not a JSON value"),
        (b'[{"text": "a"}, {"text": "b"},]', "ab", {"bad_json": 1}, r"record 3 .*not a JSON value"),
        (b'[{"text": "a"} {"text": "b"}, {"text": "c"}]', "c", {"bad_json": 1}, r"record 1 .*not a JSON value"),
        (b'[{"text": "a"}] x', "a", {"bad_json": 1}, r"record 2 \(byte 16\): there is something after the end of the list"),
        (b'[{"text": "a"}]' + b"x" * 200, "a", {"bad_json": 1}, "there is something after the end of the list"),
        (b'[{"text": "a"}, {"text": "b"}', "a", {"damaged": 1}, r"record 2 \(byte 16\): the file breaks off, the list is not closed"),
        (b'{"text": "a"} {"text": "b', "a", {"damaged": 1}, r"record 2 \(byte 14\): the file breaks off, the value is not closed"),
        (b'{"text": "a"} 12 "x" {"text": "b"}', "ab", {"bad_json": 1}, r"record 2 \(byte 14\): not a JSON value"),
        (b'{"text": "a"} {"text": "b"} x', "ab", {"bad_json": 1}, "record 3"),
        (b'{"text": "a"}\n{"text": "b}\n{"text": "c"}\n', "ac", {"bad_json": 1}, "record 2 .*a string is not closed where its line ends"),
        (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "ac", {"bad_json": 1}, "record 2 .*not a JSON value"),
        (b'[\n{"text": "a},\n{"text": "b"}]', "b", {"bad_json": 1}, "a string is not closed where its line ends"),
        (b'{"text": "a"}}{"text": "b"}', "ab", {"bad_json": 1}, "record 2 "),
        (b'[{"text": "a\xff"}, {"text": "b"}]', "b", {"undecodable": 1}, r"record 1 \(byte 1\): byte 0xff is not UTF-8"),
        (b'[{"text": "a\0"}, {"text": "b"}]', "b", {"nul": 1}, "record 1 .*NUL"),
        (b'[{"text": "' + b"x" * 100 + b'"}, {"text": "b"}]', "b", {"too_long": 1}, r"record 1 \(byte 1\): a document of 112 bytes"),
        (b'{"text": "' + b"x" * 100 + b'"} {"text": "b"}', "b", {"too_long": 1}, r"record 1 \(byte 0\): a document of 112 bytes"),
    ],
)
@pytest.mark.parametrize("piece", [3, 1 << 18])
def test_bad_json_is_named_and_what_follows_is_read(
    path: Path, data: bytes, texts: str, counts: dict[str, int], words: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "_PIECE_BYTES", piece)
    fields = {"max_document_bytes": 100}
    assert skip(path, data, **fields) == (list(texts), counts)
    with pytest.raises(DataError, match=words):
        read(path, data, **fields)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\[]{},:\n\u00e9')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(
    records=st.lists(st.dictionaries(st.text(max_size=3), values, min_size=1, max_size=3), max_size=6),
    piece=st.integers(1, 50),
    indent=st.sampled_from([None, 2]),
    between=st.sampled_from(["", "\n", " \r\n"]),
    as_list=st.booleans(),
    ascii_only=st.booleans(),
)
def test_json_is_cut_as_a_parser_of_the_whole_cuts_it(
    records: list[Any], piece: int, indent: int | None, between: str, as_list: bool, ascii_only: bool
) -> None:
    if as_list:
        text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    else:
        text = between.join(json.dumps(record, indent=indent, ensure_ascii=ascii_only) for record in records)
    stream: Any = io.BufferedReader(io.BytesIO(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_PIECE_BYTES", piece)
        found = list(json_values.json_values(stream, Path("x"), 1 << 20))
    assert not [bad for bad in found if isinstance(bad, BadDocument)]
    assert [json.loads(value.data) for value in found if isinstance(value, JsonValue)] == records
    for value in found:
        assert isinstance(value, JsonValue)
        assert text.encode()[value.offset :].startswith(value.data)


@given(
    st.lists(st.sampled_from([b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"\n", b" ", b'{"text":"a"}', b"1", b"\xff"]), max_size=40)
)
def test_any_bytes_are_read_or_counted(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    """Whatever the bytes are, pieces do not matter, and nothing else is raised."""
    path = tmp_path_factory.mktemp("any") / "a.json"
    whole = skip(path, b"".join(parts), max_document_bytes=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_PIECE_BYTES", 2)
        assert skip(path, b"".join(parts), max_document_bytes=60) == whole
    assert set(whole[0]) <= {"a"}
    assert set(whole[1]) <= {"bad_json", "missing_key", "undecodable", "too_long", "damaged", "empty", "not_text"}


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [("a.jsonl", b"1\n", "missing_key"), ("a.jsonl", b"\xff\n", "undecodable"), ("a.txt", b"\xff\n", "undecodable")],
)
def test_as_many_bad_lines_as_there_can_be(name: str, line: bytes, reason: str, tmp_path: Path) -> None:
    # with places found from the block's start each time, it would not end
    path = tmp_path / name
    path.write_bytes(line * 300_000)
    skipped = Skipped()
    assert list(read_documents(path, Reading(document="line", on_bad_document="skip"), skipped)) == []
    assert skipped == {reason: 300_000}
    assert skipped.places[99] == f"{path} line 100 (byte 198): {reason}"
    with path.open("rb") as stream:
        blocks = [block for block in line_blocks(stream, path, 1 << 20) if isinstance(block, Block)]
    assert len(blocks) > 1
    assert [blocks[-1].place(index) for index in (0, 1)] == [
        (blocks[-1].line, blocks[-1].offset),
        (blocks[-1].line + 1, blocks[-1].offset + 2),
    ]
