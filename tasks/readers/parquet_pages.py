"""Looks at a parquet file's footer and page headers before it is read, so that how much memory it takes is known first.

The sizes in the footer are claims; what a reader allocates is what each page's own header says (Apache Parquet format,
parquet.thrift: FileMetaData, PageHeader). The footer is read here too, since pyarrow ends the process where it reads
one row group's record for its caller and that makes no sense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from tasks.readers.thrift_compact import MalformedThrift, list_header, next_field, read_struct, read_value

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 32 << 20
_FIRST_HEADER_BYTES = 1 << 12
_MAX_HEADER_BYTES = 1 << 22
# Field numbers: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData
_ROW_GROUPS = 4
_COLUMNS, _NUM_ROWS = 1, 3
_META_DATA = 3
_ENCODINGS, _CHUNK_VALUES, _DATA_PAGE_OFFSET, _DICTIONARY_PAGE_OFFSET = 2, 5, 9, 11
_DELTA_BYTE_ARRAY = 7
# PageHeader and the headers in it; types of a page
_TYPE, _UNCOMPRESSED, _COMPRESSED, _DATA_HEADER, _DATA_HEADER_V2 = 1, 2, 3, 5, 8
_NUM_VALUES = 1
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3


class MalformedParquet(ValueError):
    """A footer or page header that makes no sense, or is too large."""


@dataclass(frozen=True)
class Chunk:
    """One column of one row group: where it begins, how many values it has, nulls included, and how they are written."""

    start: int
    num_values: int
    # values are written as what they add to the ones before, so that all of them can be as long as a page
    shares_prefixes: bool


@dataclass(frozen=True)
class RowGroup:
    """How many rows a row group has, and the columns that were asked for."""

    num_rows: int
    chunks: tuple[Chunk, ...]


@dataclass
class ColumnPages:
    """What the pages of one column of a row group take, in bytes, decompressed unless it says otherwise."""

    compressed: int = 0
    uncompressed: int = 0
    dictionary: int = 0
    largest: int = 0
    largest_value_mean: float = 0.0

    def values_within(self, budget: int, longest_repeated: int) -> int:
        """How many values at a time take `budget` bytes and two pages at most; one at least.

        longest_repeated: a length that no value exceeds which pages do not hold in full: the dictionary's where values are
        numbers of its entries, a page's where they are what is added to the ones before.
        """
        return max(1, int(budget / max(longest_repeated, self.largest_value_mean, 1)))


def read_footer(file: BinaryIO) -> bytes:
    """The FileMetaData of a file. Raises MalformedParquet where there is none, or it is too large to read."""
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    end = file.read(8)
    if size < 12 or end[4:] != _MAGIC:
        raise MalformedParquet("the file breaks off before a parquet footer")
    if (footer := int.from_bytes(end[:4], "little")) > min(_MAX_FOOTER_BYTES, size - 12):
        raise MalformedParquet(f"a footer of {footer:,} bytes in a file of {size:,}, at most {_MAX_FOOTER_BYTES:,} are read")
    file.seek(size - 8 - footer)
    return file.read(footer)


def row_groups(footer: bytes, columns: Sequence[int]) -> Iterator[RowGroup]:
    """The row groups with these columns (numbers of leaves in the schema). Raises MalformedParquet."""
    try:
        position = number = 0
        while number != _ROW_GROUPS:
            number, kind, position = next_field(footer, position, number)
            if not kind:
                raise MalformedParquet("the footer has no row groups")
            if number != _ROW_GROUPS:
                _, position = read_value(kind, footer, position)
        _, count, position = list_header(footer, position)
        for _ in range(count):
            group, position = _row_group(footer, position, columns)
            yield group
    except (MalformedThrift, IndexError) as error:
        raise MalformedParquet(f"the footer makes no sense ({error})") from None


def _row_group(footer: bytes, position: int, columns: Sequence[int]) -> tuple[RowGroup, int]:
    chunks: dict[int, Chunk] = {}
    num_rows = number = 0
    while True:
        number, kind, position = next_field(footer, position, number)
        if not kind:
            break
        if number == _COLUMNS:
            _, count, position = list_header(footer, position)
            for column in range(count):
                found, position = read_struct(footer, position)
                if column in columns:
                    chunks[column] = _chunk(found.get(_META_DATA))
        else:
            value, position = read_value(kind, footer, position)
            num_rows = _natural(value, "a row group") if number == _NUM_ROWS else num_rows
    if not chunks.keys() >= set(columns):
        raise MalformedParquet("a row group of the footer lacks columns")
    return RowGroup(num_rows, tuple(chunks[column] for column in columns)), position


def _chunk(record: Any) -> Chunk:
    if not isinstance(record, dict):
        raise MalformedParquet("a column of the footer has no record")
    start = _natural(record.get(_DATA_PAGE_OFFSET), "a column of the footer")
    if dictionary := _natural(record.get(_DICTIONARY_PAGE_OFFSET, 0), "a column of the footer"):
        start = min(start, dictionary)
    encodings = record.get(_ENCODINGS)
    shares_prefixes = not isinstance(encodings, list) or _DELTA_BYTE_ARRAY in encodings
    return Chunk(start, _natural(record.get(_CHUNK_VALUES), "a column of the footer"), shares_prefixes)


def scan_pages(file: BinaryIO, chunk: Chunk) -> ColumnPages:
    """Walks over the page headers of a column chunk.

    Raises MalformedParquet with the byte offset of a header that is cut off or makes no sense.
    """
    pages = ColumnPages()
    position, seen = chunk.start, 0
    while seen < chunk.num_values:
        where = f"the page header at byte {position}"
        header, size = _page_header(file, position)
        kind, uncompressed, compressed = (_natural(header.get(field), where) for field in (_TYPE, _UNCOMPRESSED, _COMPRESSED))
        pages.compressed += size + compressed
        pages.uncompressed += uncompressed
        pages.largest = max(pages.largest, uncompressed)
        if kind == _DICTIONARY_PAGE:
            pages.dictionary = max(pages.dictionary, uncompressed)
        elif kind in (_DATA_PAGE, _DATA_PAGE_V2):
            inner = header.get(_DATA_HEADER if kind == _DATA_PAGE else _DATA_HEADER_V2)
            values = _natural(inner.get(_NUM_VALUES) if isinstance(inner, dict) else None, where)
            seen += values
            pages.largest_value_mean = max(pages.largest_value_mean, uncompressed / max(values, 1))
        position += size + compressed
    return pages


def _natural(value: Any, where: str) -> int:
    """A number of a record. Raises MalformedParquet where it is missing, no number, negative, or beyond any file's size."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise MalformedParquet(f"{where} makes no sense")
    return value


def _page_header(file: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
    """The header at a byte of the file, and its size."""
    size = _FIRST_HEADER_BYTES
    while True:
        file.seek(position)
        data = file.read(size)
        try:
            return read_struct(data, 0)
        except MalformedThrift as error:
            raise MalformedParquet(f"the page header at byte {position} makes no sense ({error})") from None
        except IndexError:
            if len(data) < size or size >= _MAX_HEADER_BYTES:
                raise MalformedParquet(f"no whole page header at byte {position}") from None
            size *= 8
