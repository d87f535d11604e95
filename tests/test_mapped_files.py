"""Mapped files: no descriptor is kept, memory goes with the last array, and one bound holds for all splits of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model import mapped_files, token_split
from model.mapped_files import map_file
from model.token_store import StoreError, TokenSplit, TokenStore
from tests.synthetic_stores import BOS, EOS, random_shards, write_store


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the mappings of a process are listed on Linux only")
def test_a_file_is_mapped_without_a_descriptor_until_its_last_array_goes(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(np.arange(1000, dtype="<u4").tobytes())
    values = map_file(str(path), 4000).view("<u4")
    part = values[10:12]
    assert mappings_of(path) == 1
    assert str(path) not in {os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()}
    del values
    assert (mappings_of(path), part.tolist(), part.flags.writeable) == (1, [10, 11], False)
    del part
    assert mappings_of(path) == 0


def test_files_that_cannot_be_mapped_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert map_file(str(tmp_path / "empty"), 0).shape == (0,)
    with pytest.raises(StoreError, match=r"empty has 0 bytes, its ledger says 1; tokenize the dataset again"):
        map_file(str(tmp_path / "empty"), 1)
    with pytest.raises(StoreError, match=r"gone cannot be read \(No such file or directory\); bring it back"):
        map_file(str(tmp_path / "gone"), 1)
    size = tmp_path.stat().st_size
    with pytest.raises(StoreError, match="cannot be read"):
        map_file(str(tmp_path), size)


def held(*splits: TokenSplit) -> int:
    return sum(part is not None for split in splits for part in split._mapped)


def test_the_mappings_of_all_splits_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = random_shards(7, 3, 12)
    shards = [[], first, [], second, third, []]
    expected = [token for shard in shards for document in shard for token in (BOS, *document, EOS)]
    monkeypatch.setattr(mapped_files, "MAX_MAPPINGS", 6)
    monkeypatch.setattr(token_split, "MAPPINGS", mapped_files.MappingBudget())
    one = TokenStore.open(write_store(tmp_path / "one", "one", {"train": shards})).splits["train"]
    two = TokenStore.open(write_store(tmp_path / "two", "two", {"train": shards}, loss_mask=True)).splits["train"]
    kept = one.tokens(0, 5)
    for split in (one, two, one):
        np.testing.assert_array_equal(split.tokens(0, split.num_tokens), expected)
        assert 1 <= held(one, two) <= 3
    # two mappings a shard here and three with a mask, the oldest dropped first
    assert (held(one), held(two)) == (3, 0)
    two.loss_mask(0, 1)
    assert (held(one), held(two)) == (1, 1)
    # an array outlives what the split keeps
    del one, two, split
    assert kept.tolist() == expected[:5]
    assert not kept.flags.writeable


MANY_SHARDS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from model.token_store import TokenStore
splits = [TokenStore.open(path).splits["train"] for path in sys.argv[1:]]
for split in splits:
    assert split.num_shards == 60
    assert split.counts(512)[4] == 60
assert all(part is not None for split in splits for part in split._mapped)
"""


def test_more_shards_than_descriptors_stay_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    paths = [write_store(tmp_path / name, name, {"train": [[[3, 4]]] * 60}, loss_mask=True) for name in ("one", "two")]
    root = Path(__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", MANY_SHARDS, *map(str, paths)], cwd=root, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
