"""Opens a file as the bytes that were compressed into it: gzip, bzip2, xz and Zstandard, in bounded memory, damage and bombs refused."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, Protocol

import zstandard

from tasks.sources import DataError

# A file may always grow to this much; beyond it the growth is compared with what was read so far.
BOMB_FREE_BYTES = 64 << 20

_INPUT_BYTES = 1 << 17
_OUTPUT_BYTES = 1 << 20
# One Zstandard block is at least 4 bytes and at most 128 KiB of text: a piece this size can grow to 64 MiB and no more.
_ZSTD_PIECE_BYTES = 2048
_ZSTD_WINDOW_BYTES = 128 << 20
_XZ_MEMORY_BYTES = 160 << 20


class BrokenStream(DataError):
    """A file that cannot be read to its end: `reason` is "damaged", or "bomb" where it grows too much."""

    def __init__(self, reason: str, where: str, what: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}; {remedy}")
        self.reason, self.where, self.what, self.remedy = reason, where, what, remedy


class _Decoder(Protocol):
    """One compressed member. `decompress` gives at most some 64 MiB at a time and may keep the rest back."""

    def decompress(self, data: bytes | memoryview, /) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class _Zlib:
    """gzip by zlib, which checks header, length and CRC."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes | memoryview) -> bytes:
        tail = self._object.unconsumed_tail
        return self._object.decompress(b"".join((tail, data)) if tail else data, _OUTPUT_BYTES)

    @property
    def needs_input(self) -> bool:
        return not self._object.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data


class _Bounded:
    """A decoder of the standard library whose `decompress` takes a longest output."""

    def __init__(self, decoder: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._decoder = decoder

    def decompress(self, data: bytes | memoryview) -> bytes:
        return self._decoder.decompress(data, _OUTPUT_BYTES)

    @property
    def needs_input(self) -> bool:
        return self._decoder.needs_input

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


class _Zstd:
    """Zstandard. Its decoder gives all that its input holds, so the input is given in small pieces."""

    needs_input = True

    def __init__(self) -> None:
        self._object: Any = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(write_size=1 << 15)

    def decompress(self, data: bytes | memoryview) -> bytes:
        return self._object.decompress(data)

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data


# Suffix: the method's name, a decoder of one member, the bytes it is given at a time.
_METHODS: dict[str, tuple[str, Callable[[], _Decoder], int]] = {
    ".gz": ("gzip", _Zlib, _INPUT_BYTES),
    ".bz2": ("bzip2", lambda: _Bounded(bz2.BZ2Decompressor()), _INPUT_BYTES),
    ".xz": ("xz", lambda: _Bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)), _INPUT_BYTES),
    ".zst": ("Zstandard", _Zstd, _ZSTD_PIECE_BYTES),
    ".zstd": ("Zstandard", _Zstd, _ZSTD_PIECE_BYTES),
}
# bz2 raises OSError for bad data, and ValueError or EOFError where its caller is at fault.
_BAD_DATA = (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError)


def compression_suffix(path: str | PurePath) -> str:
    """The suffix of the file's name that says how it is compressed, in lower case; "" where it is not."""
    suffix = PurePath(path).suffix.lower()
    return suffix if suffix in _METHODS else ""


def open_text_stream(path: Path, max_expansion: int, on_read: Callable[[], None] | None = None) -> io.BufferedReader:
    """The content of a file, decompressed as its suffix says, to be read front to back; several members are read as one.

    Besides the caller's own reads it holds at most some 64 MiB, and the window of up to 128 MiB that Zstandard and xz ask for.
    Reading raises BrokenStream where the file breaks off, is corrupt, or grows to more than max_expansion times what was
    read so far and 64 MiB; what came before that place is given first. Raises OSError where the file cannot be read, and what
    `on_read` raises, which is called each time that some of the file has been read.
    """
    raw = _File(path, on_read)
    suffix = compression_suffix(path)
    return io.BufferedReader(_Decompressed(path, raw, suffix, max_expansion, on_read) if suffix else raw)


class _File(io.FileIO):
    """A file that says when it is read."""

    def __init__(self, path: Path, on_read: Callable[[], None] | None) -> None:
        super().__init__(path, "rb")
        self._on_read = on_read

    def readinto(self, buffer: Any, /) -> int | None:
        """Fills the buffer as far as the file goes."""
        if self._on_read is not None:
            self._on_read()
        return super().readinto(buffer)


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of an open file."""

    def __init__(self, path: Path, file: io.FileIO, suffix: str, max_expansion: int, on_read: Callable[[], None] | None = None) -> None:
        self._path, self._file, self._max_expansion, self._on_read = path, file, max_expansion, on_read
        self._method, self._new_decoder, self._piece_bytes = _METHODS[suffix]
        self._decoder = self._new_decoder()
        self._block = memoryview(b"")
        # where in the block the next piece begins, and how much of the file came before the block
        self._position = self._before = 0
        self._produced = 0
        self._kept = memoryview(b"")
        self._failure: BrokenStream | OSError | None = None

    def readable(self) -> bool:
        """True: it is there to be read."""
        return True

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        """Fills at least half of `buffer`, less only at the end or before damage."""
        if self._on_read is not None:
            self._on_read()
        target = memoryview(buffer).cast("B")
        filled = 0
        while filled <= len(target) // 2:
            if not self._kept:
                if self._failure is not None:
                    break
                try:
                    self._kept = memoryview(self._decode())
                except (BrokenStream, OSError) as error:
                    self._failure = error
                if not self._kept:
                    break
            size = min(len(self._kept), len(target) - filled)
            target[filled : filled + size] = self._kept[:size]
            self._kept = self._kept[size:]
            filled += size
        if self._failure is not None and not filled:
            raise self._failure
        return filled

    def _decode(self) -> bytes:
        """Some more bytes; none at the end."""
        while True:
            if self._decoder.eof and not self._next_member():
                return b""
            piece = self._piece() if self._decoder.needs_input else memoryview(b"")
            at_end = self._decoder.needs_input and not piece
            try:
                data = self._decoder.decompress(piece)
            except _BAD_DATA as error:
                raise self._damaged(f"this is no intact {self._method} data ({error})") from None
            if self._decoder.eof:
                self._position -= len(self._decoder.unused_data)
            elif at_end and not data:
                raise self._damaged(f"the file breaks off inside its {self._method} data")
            if data:
                self._produced += len(data)
                self._check_growth()
                return data

    def _piece(self) -> memoryview:
        if self._position >= len(self._block):
            self._before += len(self._block)
            self._block, self._position = memoryview(self._file.read(_INPUT_BYTES) or b""), 0
        piece = self._block[self._position : self._position + self._piece_bytes]
        self._position += len(piece)
        return piece

    def _next_member(self) -> bool:
        """Whether another member follows; zeros that fill up a tape block or an xz file are passed over."""
        while piece := self._piece():
            if rest := len(bytes(piece).lstrip(b"\0")):
                self._position -= rest
                self._decoder = self._new_decoder()
                return True
        return False

    @property
    def _where(self) -> str:
        return f"{self._path} near byte {self._before + self._position:,} (after {self._produced:,} bytes of text)"

    def _damaged(self, what: str) -> BrokenStream:
        return BrokenStream("damaged", self._where, what, "download or compress the file again")

    def _check_growth(self) -> None:
        limit = self._max_expansion * (self._before + self._position) + BOMB_FREE_BYTES
        if self._produced > limit:
            raise BrokenStream(
                "bomb",
                self._where,
                f"the file grows to more than max_expansion={self._max_expansion} times its size, like a decompression bomb",
                "look at what it holds, and raise max_expansion if that is wanted",
            )
