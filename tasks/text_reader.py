"""Reads documents out of text files in bounded memory, and says exactly where a bad one is.

Text is never changed inside a document: what separates documents (a line's end, blank lines) is left out, a byte order
mark at a file's start too, and paragraphs that are joined get one blank line between them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks.datasets import DataError, Reading

Split = str
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


class _BadDocument(Exception):
    """A document that cannot be used, why in one word, and where."""

    def __init__(self, reason: str, where: str, what: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}; {remedy}, or set on_bad_document='skip' to leave such documents out and count them")
        self.reason = reason


def split_of(text: str, holdout: float) -> Split:
    """The split of a document: "validation" for the share `holdout` of all texts, else "train".

    Decided by the text's sha256, so that a document stays where it is however the files are cut, renamed or added to.
    """
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if number < holdout * 2**64 else "train"


def read_documents(path: str | Path, reading: Reading, skipped: Counter[str] | None = None) -> Iterator[str]:
    """The documents of one file, in order. Holds at most about max_document_bytes at a time.

    Empty documents (white space alone) are left out. `skipped` counts them as "empty" and, with on_bad_document="skip",
    bad ones by reason: "too_long", "undecodable", "bad_json", "missing_key", "not_text".
    Raises DataError with the file, the line, the byte offset, what is wrong, and the remedy; with "skip" only where the
    file cannot be read at all.
    """
    counts: Counter[str] = Counter() if skipped is None else skipped
    try:
        with Path(path).open("rb") as file:
            for found in _raw_documents(file, Path(path), reading):
                try:
                    text = found.text(reading) if isinstance(found, _Raw) else _raise(found)
                except _BadDocument as bad:
                    if reading.on_bad_document == "fail":
                        raise DataError(str(bad)) from None
                    counts[bad.reason] += 1
                    continue
                if text.strip():
                    yield text
                else:
                    counts["empty"] += 1
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _raise(bad: _BadDocument) -> str:
    raise bad


class _Raw:
    """The bytes of one document and where they are: line number from 1 and byte offset from 0 of its first byte."""

    def __init__(self, path: Path, line: int, offset: int, data: bytes) -> None:
        self.path, self.line, self.offset, self.data = path, line, offset, data

    @property
    def where(self) -> str:
        """The place in words, for messages."""
        return f"{self.path} line {self.line} (byte {self.offset})"

    def undecodable(self) -> _BadDocument | None:
        """What is wrong with the bytes as UTF-8, or None."""
        try:
            self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.line + self.data.count(b"\n", 0, error.start)
            return _BadDocument(
                "undecodable",
                f"{self.path} line {line} (byte {self.offset + error.start})",
                f"byte 0x{self.data[error.start]:02x} is not UTF-8 ({error.reason})",
                "convert the file to UTF-8",
            )
        return None

    def text(self, reading: Reading) -> str:
        """The document's text. Raises _BadDocument."""
        if (bad := self.undecodable()) is not None:
            raise bad
        text = self.data.decode("utf-8")
        return self._value(text, reading.text_key) if reading.format == "jsonl" else text

    def _value(self, line: str, key: str) -> str:
        if not line.strip():
            return ""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadDocument("bad_json", self.where, f"not a JSON value ({str(error)[:120]})", "correct the line") from None
        if not isinstance(record, dict) or key not in record:
            has = f"an object with the keys {sorted(record)[:8]}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
            raise _BadDocument("missing_key", self.where, f"no key {key!r}, but {has}", "set text_key to the key that holds the text")
        value = record[key]
        if not isinstance(value, str):
            raise _BadDocument("not_text", self.where, f"{key!r} is {type(value).__name__}, not a string", "correct the line")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadDocument(
                "undecodable", self.where, f"{key!r} has half a surrogate pair at character {error.start}", "correct the line"
            ) from None
        return value


def _raw_documents(file: BinaryIO, path: Path, reading: Reading) -> Iterator[_Raw | _BadDocument]:
    if reading.format == "txt" and reading.document == "file":
        yield _whole_file(file, path, reading.max_document_bytes)
    elif reading.format == "txt" and reading.document == "paragraph":
        yield from _joined(_paragraphs(file, path, reading.max_document_bytes), reading)
    else:
        for line in _lines(file, path, reading.max_document_bytes):
            if isinstance(line, _Raw):
                line.data = _without_line_end(line.data)
            yield line


def _too_long(where: str, size: int, limit: int) -> _BadDocument:
    return _BadDocument(
        "too_long",
        where,
        f"a document of {size:,} bytes, the limit is {limit:,}",
        f"split it, or raise max_document_bytes (now {limit})",
    )


def _without_line_end(data: bytes) -> bytes:
    return data[:-2] if data.endswith(b"\r\n") else data.removesuffix(b"\n")


def _whole_file(file: BinaryIO, path: Path, limit: int) -> _Raw | _BadDocument:
    data = file.read(limit + 1)
    if len(data) > limit:
        size = len(data)
        while chunk := file.read(_CHUNK):
            size += len(chunk)
        return _too_long(f"{path} line 1 (byte 0)", size, limit)
    start = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0
    return _Raw(path, 1, start, data[start:])


def _lines(file: BinaryIO, path: Path, limit: int) -> Iterator[_Raw | _BadDocument]:
    """Lines with their ends; a line of more than `limit` bytes (its end not counted) is passed over in pieces."""
    offset, number = 0, 1
    if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
        offset = len(_BYTE_ORDER_MARK)
    file.seek(offset)
    while data := file.readline(limit + 2):
        size = len(data)
        while not data.endswith(b"\n") and (more := file.readline(_CHUNK)):
            size += len(more)
            # the end of the line is all that matters from here on, and it may have been read in two
            data = data[-1:] + more
        text_size = size - (len(data) - len(_without_line_end(data)))
        if text_size > limit:
            yield _too_long(f"{path} line {number} (byte {offset})", text_size, limit)
        else:
            yield _Raw(path, number, offset, data)
        offset, number = offset + size, number + 1


def _paragraphs(file: BinaryIO, path: Path, limit: int) -> Iterator[_Raw | _BadDocument]:
    """Blocks of lines between blank ones, without the last line's end."""
    first: _Raw | None = None
    block = bytearray()
    size = last_end = 0
    bad: _BadDocument | None = None

    def _ended() -> _Raw | _BadDocument:
        if bad is not None or first is None:
            assert bad is not None
            return bad
        if size - last_end > limit:
            return _too_long(first.where, size - last_end, limit)
        return _Raw(path, first.line, first.offset, bytes(block[: size - last_end]))

    for line in _lines(file, path, limit):
        if isinstance(line, _BadDocument):
            bad = bad or line
        elif line.data.strip():
            first = first or line
            size += len(line.data)
            last_end = len(line.data) - len(_without_line_end(line.data))
            # what is too long already is counted to its end, and not kept
            if size <= limit + 2:
                block += line.data
        else:
            if first is not None or bad is not None:
                yield _ended()
            first, block, size, bad = None, bytearray(), 0, None
    if first is not None or bad is not None:
        yield _ended()


def _joined(paragraphs: Iterator[_Raw | _BadDocument], reading: Reading) -> Iterator[_Raw | _BadDocument]:
    """Consecutive paragraphs, joined until they have min_document_bytes; never beyond max_document_bytes."""
    held: _Raw | None = None
    for paragraph in paragraphs:
        if isinstance(paragraph, _BadDocument):
            yield paragraph
            continue
        # checked here, since offsets in joined bytes are no longer offsets in the file
        if (bad := paragraph.undecodable()) is not None:
            yield bad
            continue
        if held is not None and len(held.data) + 2 + len(paragraph.data) > reading.max_document_bytes:
            yield held
            held = None
        if held is None:
            held = paragraph
        else:
            held.data = held.data + b"\n\n" + paragraph.data
        if len(held.data) >= reading.min_document_bytes:
            yield held
            held = None
    if held is not None:
        yield held
