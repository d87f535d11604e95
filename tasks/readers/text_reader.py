"""Reads documents out of files of text or records in bounded memory, and says exactly where a bad one is.

Text is never changed inside a document: what separates documents (a line's end, blank lines) is left out, a byte order
mark at a file's start too, and paragraphs that are joined get one blank line between them.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from tasks.mixture_config import Reading
from tasks.readers.compression import BrokenStream, compression_suffix, open_text_stream
from tasks.readers.line_blocks import BYTE_ORDER_MARK, BadDocument, Block, has_nul, in_words, line_blocks, not_utf8, too_long
from tasks.readers.record_reader import json_documents, jsonl_documents
from tasks.sources import DataError

Split = str
# The bytes of a document, and the block and index of the line where they begin. One for each document: a class would cost time.
_Raw = tuple[bytes, Block, int]
_CHUNK = 1 << 20
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
# What no name ends with that is a text, or records of it, in a format that is read here.
_OTHER_FORMATS = {
    **dict.fromkeys((".csv", ".tsv", ".psv", ".xls", ".xlsx", ".ods"), "a table"),
    **dict.fromkeys((".arrow", ".feather", ".avro", ".orc", ".h5", ".hdf5", ".tfrecord", ".tfrecords", ".array_record"), "records"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb", ".mds", ".msgpack"), "records"),
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".jar", ".warc"), "an archive"),
    **dict.fromkeys((".lz4", ".lzma", ".lzo", ".snappy", ".sz", ".br", ".z"), "compressed otherwise"),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".idx"), "binary data"),
    **dict.fromkeys((".pdf", ".ps", ".doc", ".docx", ".odt", ".epub", ".rtf", ".ppt", ".pptx"), "a typeset document"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".mp4", ".wav", ".flac"), "no text"),
}


def split_of(text: str, holdout: float) -> Split:
    """The split of a document: "validation" for the share `holdout` of all texts, else "train".

    Decided by the text's sha256, so that a document stays where it is however the files are cut, renamed or added to.
    """
    if holdout <= 0:
        return "train"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if number < holdout * 2**64 else "train"


class Skipped(Counter[str]):
    """Counts of what was left out, by reason, and where the first of the bad documents are."""

    MOST_PLACES = 100

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def note(self, reason: str, where: str, count: int = 1) -> None:
        """Counts a bad document and keeps its place."""
        self[reason] += count
        if len(self.places) < self.MOST_PLACES:
            self.places.append(f"{where}: {reason}")


def read_documents(
    path: str | Path, reading: Reading, skipped: Counter[str] | None = None, on_read: Callable[[], None] | None = None
) -> Iterator[str]:
    """The documents of one file, in order. Holds a few times max_document_bytes at most.

    Empty documents (white space alone, answers of nothing else) are left out. `skipped` counts them as "empty" and, with
    on_bad_document="skip", bad ones by reason: "too_long", "undecodable", "nul", "bad_json", "missing_key", "null",
    "not_text", "no_answer"; a file that breaks off or is corrupt is "damaged", and one that grows too much a "bomb": what
    was read before that place is kept.
    Raises DataError with the file, the line or record, the byte offset, what is wrong, and the remedy; with "skip" only
    where the file cannot be read at all. A `Skipped` keeps the first places too. `on_read` is called each time that some more of
    the file is read, whatever comes of it, and what it raises ends the reading.
    """
    file = Path(path)
    counts: Counter[str] = Counter() if skipped is None else skipped
    try:
        for found in _documents(file, reading, on_read):
            if isinstance(found, BadDocument):
                if reading.on_bad_document == "fail":
                    raise DataError(str(found))
                _note(counts, found.reason, found.where, found.count)
            elif not found or found.isspace():
                counts["empty"] += 1
            else:
                yield found
    except BrokenStream as broken:
        if reading.on_bad_document == "fail":
            raise DataError(f"{broken}, or set on_bad_document='skip' to keep the documents before that place") from None
        _note(counts, broken.reason, broken.where)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _note(counts: Counter[str], reason: str, where: str, count: int = 1) -> None:
    if isinstance(counts, Skipped):
        counts.note(reason, where, count)
    else:
        counts[reason] += count


def resolved_format(path: str | PurePath, reading: Reading) -> str:
    """How a file is read: "txt", "jsonl", "json" or "parquet". Raises DataError where the file's name does not allow it.

    A name that says nothing is taken for text, one that says something else is refused unless `reading.format` is set.
    """
    suffix = compression_suffix(path)
    name = PurePath(path).name
    kind = reading.format
    if kind == "auto":
        ending = PurePath(name[: len(name) - len(suffix)]).suffix.lower()
        if ending in _OTHER_FORMATS:
            raise DataError(
                f"{path}: its name ends with {ending}, {_OTHER_FORMATS[ending]}, which is not read; convert it to jsonl or parquet, leave "
                "it out of the source, or, if it is text all the same, set format='txt' (or 'jsonl', 'json', 'parquet')"
            )
        kind = _FORMATS.get(ending, "txt")
    if kind == "parquet" and suffix:
        raise DataError(f"{path}: parquet is compressed inside the file, not as a whole; decompress it and take {suffix} off its name")
    if kind == "txt" and reading.answers is not None:
        raise DataError(
            f"{path}: answers={reading.answers.kind} need records with keys, and this name stands for plain text; "
            "set format='jsonl', 'json' or 'parquet'"
        )
    return kind


def _documents(path: Path, reading: Reading, on_read: Callable[[], None] | None) -> Iterator[str | BadDocument]:
    kind = resolved_format(path, reading)
    if kind == "parquet":
        # pyarrow takes longer to import than the rest together
        from tasks.readers.parquet_reader import parquet_documents

        yield from parquet_documents(path, reading, on_read)
        return
    with open_text_stream(path, reading.max_expansion, on_read) as stream:
        if kind == "jsonl":
            yield from jsonl_documents(stream, path, reading)
        elif kind == "json":
            yield from json_documents(stream, path, reading)
        elif reading.document == "file":
            yield _whole_file(stream, path, reading.max_document_bytes)
        elif reading.document == "line":
            yield from _line_documents(stream, path, reading.max_document_bytes)
        else:
            yield from _joined(_paragraphs(stream, path, reading.max_document_bytes), reading)


def _decoded(data: bytes, block: Block, index: int) -> str | BadDocument:
    """The text of a document that begins with a line of `block`, or what is wrong with it."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return not_utf8(error, block.path, *block.place(index))
    return has_nul(data, block.path, *block.place(index)) if "\0" in text else text


def _text_or_none(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _whole_file(stream: io.BufferedReader, path: Path, limit: int) -> str | BadDocument:
    data = stream.read(limit + 1)
    if len(data) > limit:
        size = len(data)
        while chunk := stream.read1(_CHUNK):
            size += len(chunk)
        return too_long(in_words(path, 1, 0), size, limit)
    start = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
    return _decoded(data[start:] if start else data, Block(path, [], 1, start), 0)


def _line_documents(stream: io.BufferedReader, path: Path, limit: int) -> Iterator[str | BadDocument]:
    for block in line_blocks(stream, path, limit):
        if isinstance(block, BadDocument):
            yield block
            continue
        whole = b"\n".join(block.lines)
        if b"\r" not in whole and b"\0" not in whole and (text := _text_or_none(whole)) is not None:
            yield from text.split("\n")
            continue
        last = len(block.lines) - (0 if block.ended else 1)
        for index, line in enumerate(block.lines):
            yield _decoded(line[:-1] if line.endswith(b"\r") and index < last else line, block, index)


def _paragraphs(stream: io.BufferedReader, path: Path, limit: int) -> Iterator[_Raw | BadDocument]:
    """Runs of lines between blank ones, without the last line's end. One with a line that is too long is bad as a whole."""
    held = _Paragraph(limit)
    for block in line_blocks(stream, path, limit):
        if isinstance(block, BadDocument):
            held.bad = held.bad or block
            continue
        lines, begin = block.lines, 0
        for end in [index for index, line in enumerate(lines) if not line or line.isspace()]:
            if held:
                held.add(block, begin, end)
                yield held.finished(True)
            elif end > begin:
                data = b"\n".join(lines[begin:end])
                if data.endswith(b"\r"):
                    data = data[:-1]
                yield (data, block, begin) if len(data) <= limit else too_long(block.where(begin), len(data), limit)
            begin = end + 1
        held.add(block, begin, len(lines))
        held.ended = block.ended
    if held:
        yield held.finished(held.ended)


class _Paragraph:
    """A paragraph that goes on from block to block. What is too long already is counted to its end, and not kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ended = True
        self.bad: BadDocument | None = None
        self._first: tuple[Block, int] | None = None
        self._lines: list[bytes] = []
        self._size = 0

    def __bool__(self) -> bool:
        return self._first is not None or self.bad is not None

    def add(self, block: Block, begin: int, end: int) -> None:
        """Adds lines of a block."""
        if begin == end:
            return
        self._first = self._first or (block, begin)
        lines = block.lines[begin:end]
        self._size += sum(map(len, lines)) + len(lines)
        self._lines = self._lines + lines if self._size <= self.limit + 2 else lines[-1:]

    def finished(self, ended: bool) -> _Raw | BadDocument:
        """The whole paragraph; the next one begins. `ended`: its last line has an end."""
        if self.bad is not None or self._first is None:
            assert self.bad is not None
            found = self.bad
        else:
            block, index = self._first
            line_end = 1 if ended and self._lines[-1].endswith(b"\r") else 0
            if (size := self._size - 1 - line_end) > self.limit:
                found = too_long(block.where(index), size, self.limit)
            else:
                found = b"\n".join(self._lines)[:size], block, index
        self.__init__(self.limit)
        return found


def _joined(paragraphs: Iterator[_Raw | BadDocument], reading: Reading) -> Iterator[str | BadDocument]:
    """Consecutive paragraphs, joined until they have min_document_bytes; never beyond max_document_bytes."""
    least, most = reading.min_document_bytes, reading.max_document_bytes
    texts: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if isinstance(paragraph, BadDocument):
            yield paragraph
            continue
        data, block, index = paragraph
        text = _text_or_none(data)
        if text is None or "\0" in text:
            yield _decoded(data, block, index)
            continue
        if not least:
            yield text
            continue
        if texts and size + 2 + len(data) > most:
            yield "\n\n".join(texts)
            texts, size = [], 0
        size += len(data) + (2 if texts else 0)
        texts.append(text)
        if size >= least:
            yield "\n\n".join(texts)
            texts, size = [], 0
    if texts:
        yield "\n\n".join(texts)
