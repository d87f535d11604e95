"""Hostile files are read, or refused, in under 500 MB: measured in a process that does nothing else."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

ROOT = Path(__file__).resolve().parent.parent
HUNDRED_MB = 100_000_000
PEAK_KB = 500_000

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process of its own is read from /proc")

# The peak is VmHWM, not ru_maxrss: the latter of a new process begins with that of the one that started it.
READ = """
import json, sys
from collections import Counter
from tasks.mixture_config import Reading
from tasks.readers.text_reader import read_documents

results = []
for path, fields in json.loads(sys.stdin.read()):
    skipped = Counter()
    sizes = [len(text) for text in read_documents(path, Reading(**fields, on_bad_document="skip"), skipped)]
    results.append([len(sizes), sum(sizes), dict(skipped)])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([results, peak]))
"""
# One value of 100 MB that no method compresses by much, in the dictionary: read, decompressed, and copied once more.
WRITE_LONG_VALUE = """
import random, sys
import pyarrow as pa, pyarrow.parquet as pq
value = random.Random(0).randbytes(50_000_000).hex()
pq.write_table(pa.table({"text": ["first", value, "last"]}), sys.argv[1], compression="zstd")
"""
# 20 MB that compress to nothing, repeated 100,000 times: by its page headers the file holds no more than it may.
WRITE_REPEATED_VALUE = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 20_000_000]))
pq.write_table(pa.table({"text": column}), sys.argv[1], compression="zstd", store_schema=False, row_group_size=100_000)
"""

# Each value is allowed, but they are written as one page of 120 MB.
WRITE_LONG_PAGE = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
pq.write_table(pa.table({"text": ["x" * 400_000] * 300}), sys.argv[1], compression="none", use_dictionary=False)
"""


def read_in_child(*files: tuple[Path, dict[str, Any]]) -> list[list[Any]]:
    """Number and characters of the documents of each file, and what was left out; all are read in one process of at most 500 MB."""
    request = json.dumps([(str(path), fields) for path, fields in files])
    done = subprocess.run([sys.executable, "-c", READ], input=request, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results, peak = json.loads(done.stdout)
    assert peak < PEAK_KB
    return results


def write_in_child(script: str, path: Path) -> Path:
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    return path


def test_lines_and_values_of_100_mb(tmp_path: Path) -> None:
    line = b"x" * HUNDRED_MB
    (tmp_path / "a.txt").write_bytes(b"first\n\n" + line + b"\n\nlast\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n{"text": "' + line + b'"}\n{"text": "last"}\n')
    (tmp_path / "a.json").write_bytes(b'[{"text": "first"}, {"text": "' + line + b'"}, {"text": "last"}]')
    (tmp_path / "escaped.json").write_bytes(b'{"text": "first"} {"text": "' + b"\\n" * (HUNDRED_MB // 2) + b'"} {"text": "last"}')
    results = read_in_child(
        (tmp_path / "a.txt", {"document": "line"}),
        (tmp_path / "a.txt", {"document": "paragraph"}),
        (tmp_path / "a.jsonl", {}),
        (tmp_path / "a.json", {}),
        (tmp_path / "escaped.json", {}),
        (tmp_path / "a.txt", {"document": "file"}),
    )
    assert [result[:2] for result in results] == [[2, 9]] * 5 + [[0, 0]]
    assert [result[2]["too_long"] for result in results] == [1] * 6


def test_records_that_take_far_more_memory_parsed_than_written(tmp_path: Path) -> None:
    deep = b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    wide = b'{"text": "a", "x": [' + b"[]," * 1_100_000 + b"[]]}\n"
    words = b'{"text": "a", "x": [' + b'"ab",' * 3_000_000 + b'""]}\n'
    (tmp_path / "a.jsonl").write_bytes(deep + wide + words + b"[" * 100_000 + b"\n" + b'{"a":' * 100_000 + b'\n{"text": "last"}\n')
    (tmp_path / "a.json").write_bytes(b"[" + deep + b"," + wide + b"," + words + b', {"text": "last"}, ' + b"[" * 100_000)
    results = read_in_child((tmp_path / "a.jsonl", {}), (tmp_path / "a.json", {}))
    assert results == [[2, 5, {"bad_json": 4}], [2, 5, {"bad_json": 2, "damaged": 1}]]


def test_documents_just_below_the_limit(tmp_path: Path) -> None:
    texts = [bytes([97 + number]) * (15 << 20) for number in range(4)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "' + text + b'"}\n' for text in texts))
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(texts))
    results = read_in_child((tmp_path / "a.jsonl", {}), (tmp_path / "a.txt", {"document": "paragraph"}))
    assert results == [[4, 60 << 20, {}]] * 2


def test_bombs_of_more_than_2_gb(tmp_path: Path) -> None:
    zeros = bytes(1 << 24)
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(12):
            file.write(zeros)
    member = (tmp_path / "a.txt.gz").read_bytes()
    (tmp_path / "a.txt.gz").write_bytes(member * 12)
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    with (tmp_path / "a.jsonl.zst").open("wb") as file:
        for _ in range(136):
            file.write(compressor.compress(zeros))
        file.write(compressor.flush())
    (tmp_path / "b.json.zst").write_bytes(b"".join([zstandard.ZstdCompressor().compress(b" " * (1 << 24))] * 136))
    results = read_in_child(
        (tmp_path / "a.txt.gz", {"document": "line"}),
        (tmp_path / "a.txt.gz", {"document": "file"}),
        (tmp_path / "a.jsonl.zst", {}),
        (tmp_path / "b.json.zst", {}),
    )
    assert results == [[0, 0, {"bomb": 1}]] * 4


def test_parquet_with_a_value_of_100_mb(tmp_path: Path) -> None:
    path = write_in_child(WRITE_LONG_VALUE, tmp_path / "a.parquet")
    assert path.stat().st_size > 40_000_000
    assert read_in_child((path, {})) == [[2, 9, {"too_long": 1}]]


def test_parquet_with_one_value_100_000_times(tmp_path: Path) -> None:
    path = write_in_child(WRITE_REPEATED_VALUE, tmp_path / "a.parquet")
    assert path.stat().st_size < 10_000
    (number, size, skipped), repeated = read_in_child((path, {"max_document_bytes": 1 << 25}), (path, {}))
    assert skipped == {"bomb": 1}
    assert number * 20_000_000 == size <= 100_000_000
    assert repeated == [0, 0, {"bomb": 1, "too_long": repeated[2]["too_long"]}]


def test_parquet_whose_pages_are_too_large_is_left_out(tmp_path: Path) -> None:
    path = write_in_child(WRITE_LONG_PAGE, tmp_path / "a.parquet")
    assert read_in_child((path, {})) == [[0, 0, {"too_long": 300}]]
