"""Cuts a stream of JSON into its values, in bounded memory: the items of one list, or values one after the other.

Only brackets and strings are looked at; whether a value is right is for the one who parses it. Where one is so wrong that
its end cannot be seen (a string that goes on into the next line, an object that begins a line although a bracket is still
open), the next line begins a value again.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.readers.line_blocks import BadDocument, after_byte_order_mark, too_long

_PIECE_BYTES = 1 << 18
# How far back from a bracket at a line's start to look for what comes before the white space.
_TAIL_BYTES = 64
_SPACE = b" \t\n\r"
_STRING = rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
# What can be passed over up to the next bracket, or quotation mark of a string whose end is not in sight.
_INSIDE = re.compile(rb'(?:[^][{}"]+|' + _STRING + rb")*", re.DOTALL)
_IN_LIST = re.compile(rb'(?:[^][{}",]+|' + _STRING + rb")*", re.DOTALL)
_STRING_REST = re.compile(rb'[^"\\\n]*(?:\\.[^"\\\n]*)*', re.DOTALL)
_QUOTE, _COMMA, _NEWLINE, _BACKSLASH = b'",\n\\'
_OPENING, _CLOSING = frozenset(b"[{"), frozenset(b"]}")
_REMEDY = "correct the file"


@dataclass(frozen=True)
class JsonValue:
    """The bytes of one value, the byte offset it begins at, and its place in words: file, record (from 1) and offset."""

    data: bytes
    offset: int
    where: str


def json_values(stream: io.BufferedReader, path: Path, limit: int) -> Iterator[JsonValue | BadDocument]:
    """The values of a stream of JSON. One of more than `limit` bytes is passed over in pieces, and reported."""
    first, offset = after_byte_order_mark(stream)
    splitter = _Splitter(path, limit, offset)
    while piece := first + stream.read1(_PIECE_BYTES):
        first = b""
        yield from splitter.feed(piece)
        if splitter.over:
            return
    yield from splitter.finish()


class _Splitter:
    """Where in the JSON we are: inside how many brackets, inside a string or not, and the value so far."""

    def __init__(self, path: Path, limit: int, offset: int) -> None:
        self.path, self.limit, self.offset = path, limit, offset
        self.is_list: bool | None = None
        self.over = False
        self._depth = self._base = 0
        self._in_string = self._escaped = self._closed = False
        self._number = 1
        self._begin()

    def _begin(self) -> None:
        self._parts: list[bytes] = []
        self._held = self._dropped = self._value_offset = 0
        self._tail = b""

    @property
    def _where(self) -> str:
        return f"{self.path} record {self._number} (byte {self._value_offset})"

    def _bad(self, reason: str, what: str) -> BadDocument:
        bad = BadDocument(reason, self._where, what, _REMEDY)
        self._number += 1
        self._begin()
        return bad

    def feed(self, piece: bytes) -> Iterator[JsonValue | BadDocument]:
        """The values that end in this piece."""
        position = start = 0
        if self.is_list is None:
            position = start = len(piece) - len(piece.lstrip(_SPACE))
            if start == len(piece):
                self.offset += len(piece)
                return
            self.is_list = piece[start] == ord("[")
            if self.is_list:
                self._base = self._depth = 1
                position = start = start + 1
        while not self._closed:
            if self._in_string:
                position = self._string_rest(piece, position)
                if self._in_string:
                    break
                if piece[position - 1] == _NEWLINE:
                    self._take(piece, start, position)
                    yield self._bad("bad_json", "a string is not closed where its line ends")
                    self._depth, start = self._base, position
            run = _IN_LIST if self.is_list and self._depth == 1 else _INSIDE
            mark = run.match(piece, position).end()  # pyright: ignore[reportOptionalMemberAccess]
            if mark == len(piece):
                break
            position = mark + 1
            if piece[mark] == _QUOTE:
                self._in_string = True
            else:
                found, start = self._bracket(piece, start, mark)
                yield from found
                if self._closed:
                    break
        self._take(piece, start, len(piece))
        self.offset += len(piece)
        if self._closed and (self._held or self._dropped):
            self.over = True
            yield self._bad("bad_json", "there is something after the end of the list")

    def _string_rest(self, piece: bytes, position: int) -> int:
        """The position after the string that we are in, or after the line feed that cuts it; stays in it at the piece's end."""
        if self._escaped and position < len(piece):
            position, self._escaped = position + 1, False
        end = _STRING_REST.match(piece, position).end()  # pyright: ignore[reportOptionalMemberAccess]
        if end < len(piece) and piece[end] != _BACKSLASH:
            self._in_string = False
            return end + 1
        self._escaped = end < len(piece)
        return len(piece)

    def _bracket(self, piece: bytes, start: int, mark: int) -> tuple[list[JsonValue | BadDocument], int]:
        """What ends at a bracket or comma, and where the next value begins."""
        found: list[JsonValue | BadDocument] = []
        sign = piece[mark]
        if sign in _OPENING:
            if not self.is_list and (self._depth == 0 or self._begins_line(piece, start, mark)):
                # between two values is nothing but white space; anything else is a value of its own, and a bad one
                self._take(piece, start, mark)
                found += self._ended(gap=True)
                start, self._depth = mark, 0
            self._depth += 1
        elif sign in _CLOSING:
            if self.is_list and self._depth == 1 and sign == ord("]"):
                self._take(piece, start, mark)
                # the list may be empty, but nothing may be missing after a comma
                found += self._ended(gap=self._number == 1)
                self._closed, start = True, mark + 1
            elif self._depth > self._base:
                self._depth -= 1
                if not self.is_list and self._depth == 0:
                    self._take(piece, start, mark + 1)
                    found += self._ended()
                    start = mark + 1
        elif self._depth == self._base:
            self._take(piece, start, mark)
            found += self._ended()
            start = mark + 1
        return found, start

    def _begins_line(self, piece: bytes, start: int, mark: int) -> bool:
        """Whether an object begins a line where, inside another, none can begin."""
        before = self._tail + piece[max(start, mark - _TAIL_BYTES) : mark]
        return before.endswith(b"\n") and before.rstrip(_SPACE)[-1:] not in (b"", b",", b":", b"[", b"{")

    def _take(self, piece: bytes, start: int, end: int) -> None:
        """Makes piece[start:end] part of the value; of one that is too long only the size is kept."""
        part = piece[start:end]
        if not self._held and not self._dropped:
            part = part.lstrip(_SPACE)
            self._value_offset = self.offset + end - len(part)
        if part:
            self._parts.append(part)
            self._held += len(part)
            self._tail = (self._tail + part[-_TAIL_BYTES:])[-_TAIL_BYTES:]
        if self._held > self.limit + len(_SPACE):
            self._dropped += self._held
            self._parts, self._held = [], 0

    def _ended(self, gap: bool = False) -> list[JsonValue | BadDocument]:
        """The value that has just ended; none in a `gap` of white space."""
        data = b"".join(self._parts).rstrip(_SPACE)
        if gap and not data and not self._dropped:
            self._begin()
            return []
        if (size := self._dropped + len(data)) > self.limit:
            found = too_long(self._where, size, self.limit)
        else:
            found = JsonValue(data, self._value_offset, self._where)
        self._number += 1
        self._begin()
        return [found]

    def finish(self) -> Iterator[JsonValue | BadDocument]:
        """What the file's end leaves: nothing, where it is whole."""
        if self._closed or self.is_list is None:
            return
        if self.is_list or self._depth or self._in_string:
            what = "the list is not closed" if self.is_list else "the value is not closed"
            yield BadDocument("damaged", self._where, f"the file breaks off, {what}", "download or write the file again")
        else:
            yield from self._ended(gap=True)
