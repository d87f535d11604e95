"""A whole shard, read, encoded and written, takes under 500 MB whatever is in it: measured in a process that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.vocabularies.byte_pairs import added_token
from tests.synthetic_vocabulary import small_byte_pairs, small_tiktoken, small_vocabulary

ROOT = Path(__file__).resolve().parent.parent
PEAK_KB = 500_000

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process of its own is read from /proc")

# The peak is VmHWM, not ru_maxrss: the latter of a new process begins with that of the one that started it.
WRITE = """
import json, sys
from pathlib import Path
from model.vocabularies.vocabulary import Vocabulary
from tasks.mixture_config import Reading
from tasks.shard_tokenizer import ShardJob, StoreSpec, write_shard

results = []
for number, (tokenizer, path, accelerator) in enumerate(json.loads(sys.stdin.read())):
    reading = Reading(on_bad_document="skip")
    digest, directory = Vocabulary.open(tokenizer).digest, f"{path}.{number}"
    spec = StoreSpec(directory=directory, tokenizer=tokenizer, digest=digest, reading=reading, accelerator=accelerator)
    Path(spec.directory).mkdir()
    result = write_shard(spec, ShardJob(shard=0, of=1, key="key", files=(path,), source_bytes=1))
    results.append([result.documents, result.skipped])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([results, peak]))
"""
# Documents just below the default limit, and one that can be cut nowhere; a process of its own holds them as they are made.
TEXTS = """
import json, random, sys
draw, size, place = random.Random(0), int(sys.argv[2]), sys.argv[1]
letters = "abcdefghijklmnop"
texts = {
    "words": lambda: "".join(draw.choices(["to ", "be, ", "or not ", "that is", " question ", "\\n"], k=size // 6)),
    "digits": lambda: "".join(draw.choices(letters + "0123456789", k=size)),
    "characters": lambda: "".join(chr(0x4E00 + draw.randrange(20_000)) for _ in range(size // 3)),
    "run": lambda: "l" * size,
}
for name in sys.argv[3:]:
    with open(f"{place}/{name}.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps({"text": texts[name]()}, ensure_ascii=False) + "\\n" + json.dumps({"text": "last"}) + "\\n")
"""
ALMOST_16_MIB = (16 << 20) - 100


def tokenizers_of(tmp_path: Path) -> dict[str, str]:
    """Directories of a tokenizer.json that only its own library encodes, of one of plain byte pairs, a model and a tiktoken file."""
    from model.vocabularies.vocabulary import Vocabulary

    plain = json.loads(small_byte_pairs())
    found = {**plain, "added_tokens": [*plain["added_tokens"], {**added_token("  ", 700), "special": False}]}
    contents = {"other": json.dumps(found).encode(), "plain": small_byte_pairs(), "model": small_vocabulary(), "tiktoken": small_tiktoken()}
    for name, content in contents.items():
        (tmp_path / f"{name}.file").write_bytes(content)
        (tmp_path / name).mkdir()
        Vocabulary.open(tmp_path / f"{name}.file").write(tmp_path / name)
    return {name: str(tmp_path / name) for name in contents}


def shards_in_child(tmp_path: Path, *shards: tuple[str, str, str]) -> list[list[Any]]:
    """Documents of each shard, and what was left out; (tokenizer, text, accelerator) each, all made in one process of at most 500 MB."""
    directories = tokenizers_of(tmp_path)
    request = json.dumps(
        [(directories[tokenizer], str(tmp_path / f"{text}.jsonl"), accelerator) for tokenizer, text, accelerator in shards]
    )
    done = subprocess.run([sys.executable, "-c", WRITE], input=request, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results, peak = json.loads(done.stdout)
    assert peak < PEAK_KB
    return results


def write_texts(tmp_path: Path, size: int, *names: str) -> None:
    subprocess.run([sys.executable, "-c", TEXTS, str(tmp_path), str(size), *names], check=True)


@pytest.mark.slow
def test_long_documents_for_the_tokenizers_library(tmp_path: Path) -> None:
    # at 200 bytes a byte, less than half of what is allowed is enough to tell
    write_texts(tmp_path, 5 << 20, "words", "digits", "characters")
    shards = [("other", text, "none") for text in ("words", "digits", "characters")]
    assert shards_in_child(tmp_path, *shards) == [[2, {}], [2, {}], [1, {"too_long": 1}]]


@pytest.mark.slow
def test_long_documents_for_sentencepiece(tmp_path: Path) -> None:
    write_texts(tmp_path, ALMOST_16_MIB, "characters", "digits", "run")
    shards = [("model", "characters", "auto"), ("model", "digits", "none"), ("model", "run", "auto")]
    assert shards_in_child(tmp_path, *shards) == [[2, {}], [2, {}], [1, {"too_long": 1}]]


@pytest.mark.slow
def test_long_documents_for_byte_pairs(tmp_path: Path) -> None:
    write_texts(tmp_path, ALMOST_16_MIB, "digits", "run")
    shards = [("plain", "digits", "auto"), ("plain", "run", "auto"), ("tiktoken", "run", "none")]
    assert shards_in_child(tmp_path, *shards) == [[2, {}], [1, {"too_long": 1}], [1, {"too_long": 1}]]
