"""Cuts a stream into blocks of whole lines in bounded memory, and describes bad documents by file, line and byte."""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: why in one word, where it is, what is wrong, what to do, and how many it stands for."""

    reason: str
    where: str
    what: str
    remedy: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}, or set on_bad_document='skip' to leave such documents out and count them"


@dataclass
class Block:
    """Consecutive lines without the line feeds that end them. `ended`: the last one had a line feed too.

    `line` and `offset` are of the first line: its number from 1 and its byte offset from 0.
    """

    path: Path
    lines: list[bytes]
    line: int
    offset: int
    ended: bool = True

    def place(self, index: int) -> tuple[int, int]:
        """Line number and byte offset of the line with this index."""
        return self.line + index, self._offsets[index]

    @cached_property
    def _offsets(self) -> array[int]:
        """Where each line begins, of a block in which one is asked for: a block can have as many bad lines as it has lines."""
        return array("q", accumulate((len(line) + 1 for line in self.lines), initial=self.offset))

    def where(self, index: int) -> str:
        """The place of the line with this index in words, for messages."""
        return in_words(self.path, *self.place(index))


def in_words(path: Path, line: int, offset: int) -> str:
    """A place in a file of lines, for messages."""
    return f"{path} line {line} (byte {offset})"


def too_long(where: str, size: int, limit: int) -> BadDocument:
    """A document of `size` bytes where `limit` are allowed."""
    return BadDocument(
        "too_long",
        where,
        f"a document of {size:,} bytes, the limit is {limit:,}",
        f"split it, or raise max_document_bytes (now {limit})",
    )


def not_utf8(error: UnicodeDecodeError, path: Path, line: int, offset: int) -> BadDocument:
    """Bytes that are not UTF-8. Those that were decoded begin at `line` and `offset` of the file."""
    what = f"byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason})"
    return BadDocument("undecodable", _inside(error.object, error.start, path, line, offset), what, "convert the file to UTF-8")


def has_nul(data: bytes, path: Path, line: int, offset: int) -> BadDocument:
    """Bytes with a NUL among them. They begin at `line` and `offset` of the file."""
    where = _inside(data, data.index(0), path, line, offset)
    return BadDocument("nul", where, "the text has a NUL character", "remove it; or the file is damaged or no text: look at it")


def _inside(data: bytes, position: int, path: Path, line: int, offset: int) -> str:
    return in_words(path, line + data.count(b"\n", 0, position), offset + position)


def after_byte_order_mark(stream: io.BufferedReader) -> tuple[bytes, int]:
    """The first bytes of a stream without a byte order mark, and the offset of what follows the mark (0 or 3)."""
    first = stream.read(len(BYTE_ORDER_MARK))
    return (b"", len(first)) if first == BYTE_ORDER_MARK else (first, 0)


def line_blocks(stream: io.BufferedReader, path: Path, limit: int) -> Iterator[Block | BadDocument]:
    """The lines of a stream. One of more than `limit` bytes (its end not counted) is passed over in pieces, and reported.

    Holds about twice `limit` bytes at most. A carriage return before the line feed stays with the line.
    """
    first, offset = after_byte_order_mark(stream)
    line, held, held_bytes, dropped = 1, [], 0, 0
    while True:
        piece = first + stream.read1(_PIECE_BYTES) if first else stream.read1(_PIECE_BYTES)
        first = b""
        end = piece.rfind(b"\n")
        if piece and end < 0:
            held.append(piece)
            held_bytes += len(piece)
            # one byte more than the limit can still be a carriage return
            if held_bytes > limit + 1:
                dropped += held_bytes - 1
                held, held_bytes = [piece[-1:]], 1
            continue
        held.append(piece[: max(end, 0)])
        data = b"".join(held)
        if piece or data:
            block = Block(path, data.split(b"\n"), line, offset, bool(piece))
            if dropped or max(map(len, block.lines)) > limit:
                yield from _around_long_lines(block, dropped, limit)
            else:
                yield block
            line, offset = line + len(block.lines), offset + dropped + len(data) + 1
        if not piece:
            return
        held, held_bytes, dropped = [piece[end + 1 :]], len(piece) - end - 1, 0


def _around_long_lines(block: Block, dropped: int, limit: int) -> Iterator[Block | BadDocument]:
    """The block in parts, its long lines reported. The first line has `dropped` bytes more than the block holds of it."""
    start, line, offset = 0, block.line, block.offset
    for index, data in enumerate(block.lines):
        ended = block.ended or index + 1 < len(block.lines)
        size = len(data) + (dropped if index == 0 else 0)
        text_size = size - (ended and data.endswith(b"\r"))
        if text_size > limit:
            if index > start:
                yield Block(block.path, block.lines[start:index], line, offset)
            number, place = block.line + index, block.place(index)[1] + (dropped if index else 0)
            yield too_long(in_words(block.path, number, place), text_size, limit)
            start, line, offset = index + 1, number + 1, place + size + 1
    if start < len(block.lines):
        yield Block(block.path, block.lines[start:], line, offset, block.ended)
