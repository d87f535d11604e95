"""Reads documents out of parquet: only the columns that are needed, some rows at a time, in bounded memory.

Rows are named by row group and row within it, both from 0, as `ParquetFile(path).read_row_group(group)` shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.mixture_config import Chat, PromptCompletion, Reading
from tasks.readers.compression import BOMB_FREE_BYTES, BrokenStream
from tasks.readers.line_blocks import BadDocument, too_long
from tasks.readers.parquet_pages import Chunk, ColumnPages, MalformedParquet, RowGroup, read_footer, row_groups, scan_pages
from tasks.readers.record_reader import BadRecord, checked_text, document_extractor

# A page is held compressed, decompressed and, with its values, once more: with larger ones memory would pass 500 MB.
_MAX_PAGE_BYTES = 104 << 20
_BATCH_BYTES = 32 << 20
_MAX_ROWS = 1024
# Conversations have several messages a row.
_MESSAGES_A_ROW = 8
_AGAIN = "download or write the file again"


@dataclass(frozen=True)
class _Column:
    """A column of the file without columns below it: its number, dotted path, and whether a row has many of its values."""

    number: int
    path: str
    is_repeated: bool


def parquet_documents(path: Path, reading: Reading, on_read: Callable[[], None] | None = None) -> Iterator[str | BadDocument]:
    """The documents of a parquet file. Raises BrokenStream where it is damaged or grows too much, OSError where it is not there.

    `on_read` is called each time that some more rows are read, and what it raises ends the reading.
    """
    with path.open("rb") as file:
        with _damage_named(path):
            footer = read_footer(file)
            metadata = pq.read_metadata(path)
            columns = _needed_columns(path, metadata, reading) if metadata.num_rows else []
        if not columns:
            return
        if isinstance(columns, BadDocument):
            yield columns
            return
        with _damage_named(path):
            repeated = [column.path for column in columns if column.is_repeated]
            table = pq.ParquetFile(
                path, metadata=metadata, read_dictionary=repeated, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            )
        groups = enumerate(row_groups(footer, [column.number for column in columns]))
        with table:
            reader = _GroupReader(path, file, table, columns, reading, on_read)
            while True:
                with _damage_named(path):
                    found = next(groups, None)
                if found is None:
                    return
                yield from reader.documents(*found)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what the footer of a damaged file raises into BrokenStream."""
    try:
        yield
    except (MalformedParquet, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BrokenStream("damaged", f"{path}", f"its footer cannot be used: {str(error)[:300]}", _AGAIN) from None


def _needed_columns(path: Path, metadata: Any, reading: Reading) -> list[_Column] | BadDocument:
    """The columns that documents are made of, or why there is none."""
    leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    answers = reading.answers
    if isinstance(answers, Chat):
        field, keys = "answers.messages_key", [f"{answers.messages_key}.*.{name}" for name in ("content", "role")]
    elif isinstance(answers, PromptCompletion):
        field, keys = "answers.prompt_key and completion_key", [answers.prompt_key, answers.completion_key]
    else:
        field, keys = "text_key", [reading.text_key]
    columns: list[_Column] = []
    for key in keys:
        start, _, name = key.rpartition(".*.")
        found = [
            number
            for number, leaf in enumerate(leaves)
            if leaf.path == key or (start and leaf.path.startswith(f"{start}.") and leaf.path.split(".")[-1] == name)
        ]
        if not found:
            has = sorted({leaf.path for leaf in leaves})[:8]
            return BadDocument("missing_key", f"{path}", f"no column {key!r}, but {has}", f"set {field}", metadata.num_rows)
        leaf = leaves[found[0]]
        if leaf.physical_type != "BYTE_ARRAY" or leaf.max_repetition_level != bool(start):
            kind = f"{leaf.physical_type}{' in lists' * leaf.max_repetition_level}"
            return BadDocument("not_text", f"{path}", f"the column {leaf.path!r} is {kind}, not text", f"set {field}", metadata.num_rows)
        columns.append(_Column(found[0], leaf.path, bool(start)))
    return columns


class _GroupReader:
    """Reads row groups of an open file, and keeps count of how much was read."""

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        table: Any,
        columns: list[_Column],
        reading: Reading,
        on_read: Callable[[], None] | None,
    ) -> None:
        self._path, self._file, self._table, self._columns, self._reading = path, file, table, columns, reading
        self._on_read = on_read
        self._limit = reading.max_document_bytes
        self._compressed = self._produced = 0
        self._extract: Callable[[Any], str] | None = document_extractor(reading) if reading.answers is not None else None

    def documents(self, number: int, group: RowGroup) -> Iterator[str | BadDocument]:
        """The documents of one row group."""
        where = f"{self._path} row group {number}"
        pages = [self._scanned(chunk, column, where) for chunk, column in zip(group.chunks, self._columns, strict=True)]
        if (largest := max(page.largest for page in pages)) > max(_MAX_PAGE_BYTES, self._limit + (1 << 20)):
            what = f"a page of {largest:,} bytes cannot be read in bounded memory"
            yield BadDocument("too_long", where, what, "write the file with smaller pages, or raise max_document_bytes", group.num_rows)
            return
        row = 0
        for batch in self._batches(number, self._rows_at_once(group, pages), where):
            documents = self._texts(batch, where, row) if self._extract is None else self._records(batch, self._extract, where, row)
            yield from documents
            row += batch.num_rows
        if row != group.num_rows:
            raise BrokenStream("damaged", f"{where} row {row}", f"it has {row:,} rows, its footer says {group.num_rows:,}", _AGAIN)

    def _scanned(self, chunk: Chunk, column: _Column, where: str) -> ColumnPages:
        try:
            pages = scan_pages(self._file, chunk)
        except MalformedParquet as error:
            raise BrokenStream("damaged", f"{where} column {column.path!r}", str(error), _AGAIN) from None
        self._compressed += pages.compressed
        # even nulls are rows to look at
        self._check_growth(pages.uncompressed + chunk.num_values, pages.compressed, where)
        return pages

    def _check_growth(self, size: int, compressed: int, where: str) -> None:
        if size > self._reading.max_expansion * compressed + BOMB_FREE_BYTES:
            raise BrokenStream(
                "bomb",
                where,
                f"{compressed:,} bytes become more than max_expansion={self._reading.max_expansion} times as much",
                "look at what the file holds, and raise max_expansion if that is wanted",
            )

    def _rows_at_once(self, group: RowGroup, pages: list[ColumnPages]) -> int:
        rows = _MAX_ROWS
        for column, chunk, page in zip(self._columns, group.chunks, pages, strict=True):
            # the dictionaries of repeated columns are kept as they are, not spelt out
            longest = page.largest if chunk.shares_prefixes else 0 if column.is_repeated else page.dictionary
            values = page.values_within(_BATCH_BYTES, longest)
            rows = min(rows, max(1, values // _MESSAGES_A_ROW) if column.is_repeated else values)
        return rows

    def _batches(self, group: int, rows: int, where: str) -> Iterator[Any]:
        names = [column.path for column in self._columns]
        done = 0
        with closing(self._table.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)) as batches:
            while True:
                if self._on_read is not None:
                    self._on_read()
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise BrokenStream("damaged", f"{where} row {done} or soon after", str(error)[:300], _AGAIN) from None
                if batch is None:
                    return
                done += batch.num_rows
                yield batch

    def _grown(self, sizes: np.ndarray, where: str) -> None:
        """Adds the sizes of some rows to what was read."""
        self._produced += int(sizes.sum())
        self._check_growth(self._produced, self._compressed, where)

    def _texts(self, batch: Any, where: str, first: int) -> Iterator[str | BadDocument]:
        """The documents of one column of text. first: the number of the batch's first row."""
        array = batch.column(0)
        while pa.types.is_struct(array.type):
            array = array.flatten()[0]
        if pa.types.is_dictionary(array.type) or "view" in str(array.type):
            array = array.cast(pa.large_binary())
        sizes = row_sizes(array)
        self._grown(sizes, f"{where} row {first}")
        values = _values(array, sizes, self._limit)
        key = self._columns[0].path
        for row, value in enumerate(values):
            if type(value) is str and "\0" not in value:
                yield value
            elif sizes[row] > self._limit:
                yield too_long(f"{where} row {first + row}", int(sizes[row]), self._limit)
            else:
                try:
                    yield checked_text(value, key)
                except BadRecord as bad:
                    yield bad.at(f"{where} row {first + row}")

    def _records(self, batch: Any, extract: Callable[[Any], str], where: str, first: int) -> Iterator[str | BadDocument]:
        """The documents of records with questions and answers. first: the number of the batch's first row."""
        sizes = sum((row_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))
        self._grown(sizes, f"{where} row {first}")
        records: list[Any] | None = None
        if sizes.sum() <= _BATCH_BYTES and sizes.max(initial=0) <= self._limit:
            try:
                records = batch.to_pylist()
            except (UnicodeDecodeError, pa.ArrowException):
                records = None
        for row, size in enumerate(sizes):
            place = f"{where} row {first + row}"
            if size > self._limit:
                yield too_long(place, int(size), self._limit)
                continue
            try:
                # one row at a time where together they could be far larger than the columns they come from
                yield extract(records[row] if records is not None else batch.slice(row, 1).to_pylist()[0])
            except BadRecord as bad:
                yield bad.at(place)
            except UnicodeDecodeError as error:
                yield BadDocument("undecodable", place, f"not UTF-8 ({error.reason})", "convert the text to UTF-8")
            except pa.ArrowException as error:
                raise BrokenStream("damaged", place, str(error)[:300], _AGAIN) from None


def _values(array: Any, sizes: np.ndarray, limit: int) -> Iterable[Any]:
    """The values as Python has them: bytes where they are no UTF-8, None where they are longer than `limit` bytes."""
    if len(sizes) == 0 or sizes.max() <= limit:
        with suppress(UnicodeDecodeError):  # then value by value, to tell which
            return array.to_pylist()
    return (_one_value(array, row) if size <= limit else None for row, size in enumerate(sizes))


def _one_value(array: Any, row: int) -> Any:
    try:
        return array[row].as_py()
    except UnicodeDecodeError:
        return array[row].as_buffer().to_pybytes()


def row_sizes(array: Any) -> np.ndarray:
    """int64 [rows]: the bytes of the strings in each row of an array of strings, or of structs and lists of them; not exact for nulls."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = row_sizes(array.dictionary)
        indices = array.indices
        kind = np.dtype(indices.type.to_pandas_dtype())
        numbers = np.frombuffer(indices.buffers()[1], kind)[indices.offset : indices.offset + len(indices)]
        # the index of a null can be any number
        return lengths[np.clip(numbers, 0, len(lengths) - 1)] if len(lengths) else np.zeros(len(indices), np.int64)
    if pa.types.is_struct(kind):
        return sum((row_sizes(field) for field in array.flatten()), np.zeros(len(array), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        ends = np.concatenate([[0], np.cumsum(row_sizes(array.values))])
        offsets = array.offsets.to_numpy()
        return ends[offsets[1:]] - ends[offsets[:-1]]
    width = np.int64 if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) else np.int32
    offsets = np.frombuffer(array.buffers()[1], width)[array.offset : array.offset + len(array) + 1]
    return np.diff(offsets).astype(np.int64)
