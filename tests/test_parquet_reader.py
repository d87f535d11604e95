"""Parquet: only the needed columns, every type of text, rows named, files cut or changed anywhere, and sizes that lie."""

from __future__ import annotations

import json
import random
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.mixture_config import Reading
from tasks.readers.parquet_pages import Chunk, MalformedParquet, read_footer, row_groups, scan_pages
from tasks.readers.parquet_reader import row_sizes
from tasks.readers.text_reader import read_documents
from tasks.sources import DataError

TEXTS = [f"document {number} \u00e9" * (number % 7 + 1) for number in range(500)]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.parquet"


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **{"row_group_size": 200, **options})
    return path


def read(path: Path, **fields: object) -> list[str]:
    return list(read_documents(path, Reading.model_validate(fields)))


def skip(path: Path, **fields: object) -> tuple[list[str], dict[str, int]]:
    skipped: Counter[str] = Counter()
    found = list(read_documents(path, Reading.model_validate({**fields, "on_bad_document": "skip"}), skipped))
    return found, dict(skipped)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd", "data_page_size": 500},
        {"compression": "gzip", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "none", "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"compression": "brotli", "use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"dictionary_pagesize_limit": 1000, "data_page_size": 1000, "write_page_checksum": True, "write_page_index": True},
    ],
)
def test_every_encoding_and_compression(path: Path, options: dict[str, Any]) -> None:
    assert read(write(path, {"n": list(range(500)), "text": TEXTS}, **options)) == TEXTS


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_type_of_text(path: Path, kind: pa.DataType) -> None:
    values = pa.array(TEXTS).cast(pa.string()).cast(kind) if "binary" not in str(kind) else pa.array([t.encode() for t in TEXTS], kind)
    assert read(write(path, {"text": values})) == TEXTS


def test_text_in_structs_and_columns_with_dots(path: Path) -> None:
    write(path, {"meta": [{"text": "a", "n": 1}, {"text": None, "n": 2}, None, {"text": "b", "n": 3}]})
    assert skip(path, text_key="meta.text") == (["a", "b"], {"null": 2})
    with pytest.raises(DataError, match=r"t\.parquet row group 0 row 1: 'meta\.text' is null, not a string"):
        read(path, text_key="meta.text")
    assert read(write(path, {"a.b": ["x"]}), text_key="a.b") == ["x"]


def test_only_the_needed_column_is_read(path: Path) -> None:
    write(
        path,
        {"other": [bytes(random.Random(n).randbytes(50)) for n in range(500)], "text": TEXTS},
        use_dictionary=False,
        compression="none",
    )
    chunk = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    assert read(path) == TEXTS


def test_bad_rows_are_named_by_row_group_and_row(path: Path) -> None:
    values = ["a", None, "", "b\0", "c" * 99, b"\xff\xfe", "d"]
    column = pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary())
    for text in (column, pa.Array.from_buffers(pa.string(), len(column), column.buffers())):
        write(path, {"text": text}, row_group_size=4, store_schema=False)
        expected = {"null": 1, "empty": 1, "nul": 1, "too_long": 1, "undecodable": 1}
        assert skip(path, max_document_bytes=50) == (["a", "d"], expected)
    for row, words in [
        ((0, 1), "'text' is null, not a string"),
        ((0, 3), "'text' has a NUL character at 1"),
        ((1, 0), "a document of 99 bytes, the limit is 50"),
        ((1, 1), "'text' has byte 0xff at 0, which is not UTF-8"),
    ]:
        write(path, {"text": column.slice(row[0] * 4 + row[1])}, row_group_size=4)
        with pytest.raises(DataError, match=f"row group 0 row 0: {words}"):
            read(path, max_document_bytes=50)
    write(path, {"text": ["a"] * 6 + [None]}, row_group_size=4)
    with pytest.raises(DataError, match="row group 1 row 2: 'text' is null"):
        read(path)


def test_a_column_that_is_not_there_or_no_text_counts_for_every_row(path: Path) -> None:
    write(path, {"n": list(range(9)), "list": [["a"]] * 9})
    assert skip(path) == ([], {"missing_key": 9})
    assert skip(path, text_key="n") == ([], {"not_text": 9})
    assert skip(path, text_key="list.list.element") == ([], {"not_text": 9})
    with pytest.raises(DataError, match=r"t\.parquet: no column 'text', but \['list\.list\.element', 'n'\]; set text_key, or set on_bad"):
        read(path)
    with pytest.raises(DataError, match="the column 'n' is INT64, not text"):
        read(path, text_key="n")
    assert skip(write(path, {"n": pa.array([], pa.int64())})) == ([], {})


def test_prompts_and_completions(path: Path) -> None:
    write(path, {"prompt": ["a", "b", None], "n": [1, 2, 3], "completion": ["x", " ", "z"]})
    assert skip(path, answers={"kind": "prompt_completion"}) == (['{"completion":"x","prompt":"a"}'], {"empty": 1, "null": 1})
    answers = {"kind": "prompt_completion", "completion_key": "answer"}
    assert skip(path, answers=answers) == ([], {"missing_key": 3})


def test_conversations(path: Path) -> None:
    many = [{"role": role, "content": f"{role} {number}"} for number in range(40) for role in ("user", "assistant")]
    rows = [TURNS, [], [{"role": "user", "content": "x"}], None, [{"role": "user", "content": None}], many]
    write(path, {"id": [str(n) for n in range(6)], "messages": [[{**turn, "name": 1} for turn in row] if row else row for row in rows]})
    answers = {"kind": "chat"}
    found, skipped = skip(path, answers=answers)
    assert [json.loads(document) for document in found] == [TURNS, many]
    assert skipped == {"no_answer": 2, "null": 2}
    assert skip(path, answers=answers, max_document_bytes=100)[1] == {**skipped, "too_long": 1}
    with pytest.raises(DataError, match="row group 0 row 1: 'messages' has no turn of the role 'assistant'"):
        read(path, answers=answers)
    assert skip(path, answers={"kind": "chat", "messages_key": "id"}) == ([], {"missing_key": 6})


def test_undecodable_conversations_do_not_hide_the_others(path: Path) -> None:
    content = pa.array([b"Hi", b"\xff", b"Ho"], pa.binary())
    struct = pa.StructArray.from_arrays(
        [pa.array(["assistant"] * 3), pa.Array.from_buffers(pa.string(), 3, content.buffers())], names=["role", "content"]
    )
    write(path, {"messages": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), struct)})
    found, skipped = skip(path, answers={"kind": "chat"})
    assert [json.loads(document)[0]["content"] for document in found] == ["Hi", "Ho"]
    assert skipped == {"undecodable": 1}


def test_sizes_of_rows() -> None:
    strings = pa.array(["a", None, "bcd", "\u00e9"])
    for kind in (pa.string(), pa.large_string()):
        assert row_sizes(strings.cast(kind)).tolist() == [1, 0, 3, 2]
        assert row_sizes(strings.cast(kind).slice(2)).tolist() == [3, 2]
    assert row_sizes(strings.dictionary_encode())[[0, 2, 3]].tolist() == [1, 3, 2]
    assert row_sizes(strings.dictionary_encode().slice(2)).tolist() == [3, 2]
    assert row_sizes(pa.array([None], pa.dictionary(pa.int32(), pa.string()))).tolist() == [0]
    turns = pa.array([TURNS, [], TURNS * 3], pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})))
    assert row_sizes(turns).tolist() == [17, 0, 51]
    assert row_sizes(turns.slice(1)).tolist() == [0, 51]


@pytest.mark.parametrize("name", ["none", "zstd"])
def test_a_file_cut_anywhere_is_damaged(path: Path, name: str) -> None:
    whole = write(path, {"text": TEXTS}, compression=name).read_bytes()
    for size in [0, 3, 8, 11, 12, len(whole) // 3, len(whole) // 2, len(whole) - 300, len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert skip(path) == ([], {"damaged": 1}), size
        with pytest.raises(DataError, match=r"t\.parquet.*; download or write the file again, or set on_bad_document='skip' to keep"):
            read(path)


def test_a_file_changed_anywhere_gives_documents_or_damage(path: Path) -> None:
    """What can be read before the change is kept; with page checksums nothing wrong is read."""
    whole = write(path, {"text": TEXTS}, compression="zstd", write_page_checksum=True).read_bytes()
    damaged = 0
    for position in range(10, len(whole) - 8, len(whole) // 150):
        changed = bytearray(whole)
        changed[position] ^= 0x41
        path.write_bytes(changed)
        found, skipped = skip(path)
        assert len(found) <= len(TEXTS)
        assert set(skipped) <= {"damaged", "bomb", "too_long", "missing_key", "not_text", "null", "undecodable"}
        if skipped.get("damaged"):
            damaged += 1
            assert found == TEXTS[: len(found)]
    assert damaged > 40


def test_damage_names_the_row_group_and_keeps_what_was_before(path: Path) -> None:
    write(path, {"text": TEXTS}, compression="zstd")
    chunk = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset - 40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="row group 1"):
        read(path)
    assert skip(path) == (TEXTS[:200], {"damaged": 1})


def test_the_footer_and_page_headers_are_read_as_they_are_written(path: Path) -> None:
    columns = {"n": list(range(500)), "text": TEXTS}
    encoding = {"text": "DELTA_BYTE_ARRAY", "n": "PLAIN"}
    write(path, columns, compression="none", data_page_size=400, use_dictionary=False, column_encoding=encoding)
    with path.open("rb") as file:
        groups = list(row_groups(read_footer(file), [1, 0]))
        metadata = pq.read_metadata(path)
        assert [group.num_rows for group in groups] == [200, 200, 100]
        for number, group in enumerate(groups):
            for column, chunk in zip([1, 0], group.chunks, strict=True):
                expected = metadata.row_group(number).column(column)
                assert (chunk.start, chunk.num_values) == (expected.data_page_offset, expected.num_values)
                assert chunk.shares_prefixes == (column == 1)
                pages = scan_pages(file, chunk)
                assert pages.compressed == expected.total_compressed_size == expected.total_uncompressed_size
                assert pages.dictionary == 0 < pages.uncompressed < pages.compressed
                assert pages.values_within(1 << 20, 0) == int((1 << 20) / pages.largest_value_mean)
                assert pages.values_within(10, 100) == 1
    chunk = groups[-1].chunks[0]
    end = chunk.start + metadata.row_group(2).column(1).total_compressed_size
    with pytest.raises(MalformedParquet, match=r"no whole page header at byte \d+"):
        scan_pages(BytesIO(path.read_bytes()[:end]), Chunk(chunk.start, chunk.num_values + 1, False))
    with pytest.raises(MalformedParquet, match="the page header at byte 0 makes no sense"):
        scan_pages(BytesIO(b"\x15\x00\x15\x01\x15\x02\x00"), Chunk(0, 1, False))
    with pytest.raises(MalformedParquet, match="lacks columns"):
        list(row_groups(path.read_bytes()[end:-8][-read_footer_size(path) :], [7]))


def read_footer_size(path: Path) -> int:
    with path.open("rb") as file:
        return len(read_footer(file))


@pytest.mark.parametrize(
    "header", [b"\x1c" * 100, b"\x19\xfc" + b"\xff" * 20, b"\x18\xff\xff\xff\xff\x0f", b"\x1b\x00", b"\x15" + b"\x80" * 30]
)
def test_page_headers_that_make_no_sense_are_refused(header: bytes) -> None:
    with pytest.raises(MalformedParquet):
        scan_pages(BytesIO(header), Chunk(0, 1, False))


def test_a_dictionary_bomb_is_refused(path: Path) -> None:
    """One megabyte, compressed to nothing, and 100,000 references to it."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * (1 << 20)]))
    write(path, {"text": column}, compression="zstd", store_schema=False, row_group_size=100_000)
    assert path.stat().st_size < 3000
    found, skipped = skip(path)
    assert skipped == {"bomb": 1}
    assert len(found) < 70
    with pytest.raises(DataError, match=r"row group 0 row .*max_expansion=200.*raise max_expansion if that is wanted, or set on_bad"):
        read(path)


def test_a_footer_that_claims_too_much_is_refused(path: Path) -> None:
    path.write_bytes(b"PAR1" + b"\0" * 100 + (1 << 30).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="a footer of 1,073,741,824 bytes"):
        read(path)


def test_it_can_be_told_to_end_between_rows(tmp_path: Path) -> None:
    path = tmp_path / "nulls.parquet"
    pq.write_table(pa.table({"text": pa.array([None] * 20_000, pa.string())}), path)
    looked: list[int] = []
    skipped: Counter[str] = Counter()
    reading = Reading(on_bad_document="skip")
    assert list(read_documents(path, reading, skipped, lambda: looked.append(skipped["null"]))) == []
    assert skipped == {"null": 20_000}
    assert looked[0] == 0
    assert len([number for number in looked if 0 < number < 20_000]) > 10
