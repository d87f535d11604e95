"""Compressed files: every method, several members, files cut anywhere, damage, and bombs."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tasks.mixture_config import Reading
from tasks.readers.compression import BOMB_FREE_BYTES, BrokenStream, compression_suffix, open_text_stream
from tasks.readers.text_reader import read_documents
from tasks.sources import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".zstd": zstandard.ZstdCompressor(write_content_size=False).compress,
}
WORDS = random.Random(0).choices(["to", "be", "or", "not", "that", "is", "the", "question", "nobler", "mind"], k=50_000)
LINES = [" ".join(WORDS[start : start + 12]) for start in range(0, len(WORDS), 12)]
TEXT = "".join(f"{number} {line}\n" for number, line in enumerate(LINES)).encode()
EXPECTED = TEXT.decode().splitlines()

every_method = pytest.mark.parametrize("suffix", list(COMPRESS))


def documents(path: Path, skipped: Counter[str] | None = None, **fields: object) -> list[str]:
    return list(read_documents(path, Reading.model_validate({"document": "line", **fields}), skipped))


def written(directory: Path, suffix: str, data: bytes) -> Path:
    path = directory / f"text.txt{suffix}"
    path.write_bytes(data)
    return path


def test_the_suffix_says_how_a_file_is_compressed() -> None:
    assert [compression_suffix(f"a{suffix}") for suffix in COMPRESS] == list(COMPRESS)
    assert compression_suffix("a.jsonl.GZ") == ".gz"
    assert [compression_suffix(name) for name in ("a.txt", "a", "gz", "a.gz.txt", ".gz")] == [""] * 5


@every_method
def test_one_or_several_members_are_one_text(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    assert documents(written(tmp_path, suffix, compress(TEXT))) == EXPECTED
    parts = compress(TEXT[:1000]) + compress(b"") + compress(TEXT[1000:1001]) + compress(TEXT[1001:])
    assert documents(written(tmp_path, suffix, parts)) == EXPECTED
    assert documents(written(tmp_path, suffix, compress(b""))) == []


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_zeros_that_fill_up_the_file_are_no_data(tmp_path: Path, suffix: str) -> None:
    data = COMPRESS[suffix](TEXT)
    assert documents(written(tmp_path, suffix, data + b"\0" * 200_000)) == EXPECTED
    assert documents(written(tmp_path, suffix, data + b"\0" * 512 + data)) == EXPECTED * 2


@every_method
def test_a_file_cut_anywhere_keeps_what_came_before_and_is_counted(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESS[suffix](TEXT)
    sizes = [0, 1, 3, 9, 17, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 5, len(whole) - 1]
    kept: list[int] = []
    for size in sizes:
        path = written(tmp_path, suffix, whole[:size])
        skipped: Counter[str] = Counter()
        found = documents(path, skipped, on_bad_document="skip")
        assert found == EXPECTED[: len(found)], size
        assert skipped == {"damaged": 1}, size
        kept.append(len(found))
        with pytest.raises(DataError, match=r"text\.txt.* near byte [\d,]+ \(after [\d,]+ bytes of text\).* breaks off") as error:
            documents(path)
        assert "download or compress the file again, or set on_bad_document='skip' to keep" in str(error.value)
    assert kept == sorted(kept)
    # a block of bzip2 (900 kB) is longer than this text: it gives all or nothing
    assert suffix == ".bz2" or kept[-1] > 0


@every_method
def test_bytes_that_are_something_else_are_damage(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESS[suffix](TEXT)
    with pytest.raises(BrokenStream, match=r"this is no intact .* data"):
        open_text_stream(written(tmp_path, suffix, TEXT), 200).read()
    with pytest.raises(BrokenStream, match=r"this is no intact .* data"):
        open_text_stream(written(tmp_path, suffix, whole + b"garbage after the end"), 200).read()


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_changed_byte_is_found_by_the_checksum(tmp_path: Path, suffix: str) -> None:
    whole = bytearray(COMPRESS[suffix](TEXT))
    for position in range(len(whole) // 4, len(whole), len(whole) // 4 - 1):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        with pytest.raises(BrokenStream):
            open_text_stream(written(tmp_path, suffix, bytes(changed)), 200).read()


@every_method
def test_a_bomb_is_refused_long_before_its_end(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix, COMPRESS[suffix](b"\0" * (8 << 20)) * 300)
    pieces: list[int] = []
    with pytest.raises(BrokenStream, match="grows to more than max_expansion=50 times its size, like a decompression bomb") as error:
        pieces.extend(map(len, iter(functools.partial(open_text_stream(path, 50).read1, 1 << 20), b"")))
    assert error.value.reason == "bomb"
    assert sum(pieces) <= BOMB_FREE_BYTES * 2
    skipped: Counter[str] = Counter()
    assert documents(path, skipped, on_bad_document="skip", max_expansion=50) == []
    assert skipped == {"bomb": 1}


def test_what_grows_less_than_64_mib_is_no_bomb(tmp_path: Path) -> None:
    data = b"x" * (16 << 20)
    assert open_text_stream(written(tmp_path, ".gz", gzip.compress(data)), 1).read() == data


def test_windows_that_take_too_much_memory_are_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    path = written(tmp_path, ".xz", lzma.compress(TEXT, lzma.FORMAT_XZ, filters=filters))
    with pytest.raises(BrokenStream, match="Memory usage limit"):
        open_text_stream(path, 200).read()
    # magic, a frame header without content size, and a window of 2 GiB
    path = written(tmp_path, ".zst", b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x01\x00\x00")
    with pytest.raises(BrokenStream, match="memory"):
        open_text_stream(path, 200).read()


def test_a_stream_is_read_in_any_way(tmp_path: Path) -> None:
    with open_text_stream(written(tmp_path, ".zst", COMPRESS[".zst"](TEXT)), 200) as stream:
        assert stream.readline(4) == TEXT[:4]
        assert stream.readline() == TEXT[4 : TEXT.index(b"\n") + 1]
        assert stream.read() == TEXT[TEXT.index(b"\n") + 1 :]
        assert stream.read(1) == b""
