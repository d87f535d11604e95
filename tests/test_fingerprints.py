"""Fingerprints are stable text, tell different things apart, and say what differs."""

import enum
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from model.config_base import Config, runtime
from tasks.fingerprints import canonical_json, differences, file_digest, fingerprint, plain_value


class Inner(Config):
    rate: float = 0.1
    workers: int = runtime(4)


class Outer(Config):
    inner: Inner = Inner()
    names: tuple[str, ...] = ("b", "a")
    note: str = runtime("x")


class Color(enum.Enum):
    RED = "red"


class Level(int, enum.Enum):
    LOW = 1


def test_canonical_json_is_sorted_and_has_lists_for_tuples_and_sorted_lists_for_sets():
    assert canonical_json({"b": (1, 2.5), "a": {"z", "y"}}) == '{"a":["y","z"],"b":[1,2.5]}'


def test_a_config_counts_with_its_identity_fields_only():
    assert canonical_json(Outer()) == '{"inner":{"rate":0.1},"names":["b","a"]}'
    assert fingerprint(Outer()) == fingerprint(Outer(inner=Inner(workers=9), note="y"))
    assert fingerprint(Outer()) != fingerprint(Outer(inner=Inner(rate=0.2)))


def test_fingerprint_is_the_sha256_of_the_canonical_text():
    assert fingerprint([1]) == hashlib.sha256(b"[1]").hexdigest()


@pytest.mark.parametrize("value", [3e-3, 1e-5, 0.1 + 0.2, 1e22, -0.0, 2.0])
def test_floats_read_back_exactly(value: float):
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), ("1", 1), ([], {}), (None, "null"), ([1, 2], [2, 1]), ("e\u0301", "\xe9")])
def test_different_values_have_different_fingerprints(one: object, other: object):
    assert fingerprint(one) != fingerprint(other)


def test_enums_count_with_their_value():
    assert canonical_json([Color.RED, Level.LOW]) == '["red",1]'


def test_sets_do_not_depend_on_the_hash_seed():
    code = "from tasks.fingerprints import fingerprint; print(fingerprint({'x': {'b', 'a', 'c', 'dd', 'e'}}))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1


def test_a_type_without_stable_text_is_refused_with_its_path():
    with pytest.raises(TypeError, match=r"value\.a\[1\] is a object"):
        canonical_json({"a": [1, object()]})


def test_keys_that_are_not_text_are_refused():
    with pytest.raises(TypeError, match="keys must be text"):
        canonical_json({"a": {1: 2}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_in_fingerprints_and_become_text_in_records(value: float):
    with pytest.raises(ValueError, match="finite"):
        canonical_json({"x": value})
    assert plain_value({"x": value}) == {"x": str(value)}


def test_records_take_numpy_scalars():
    assert plain_value({"loss": np.float32(0.5), "n": np.int64(3), "ok": np.bool_(True), 4: (1,)}) == {
        "loss": 0.5,
        "n": 3,
        "ok": True,
        "4": [1],
    }


def test_records_refuse_what_is_not_json():
    with pytest.raises(TypeError, match=r"stats\.x is a object"):
        plain_value({"x": object()}, "stats")


def test_differences_name_the_field_and_both_values():
    old = {"train": {"learning_rate": 0.001, "steps": 5}, "gone": 1, "same": [1, {"a": 2}], "list": [1, 2]}
    new = {"train": {"learning_rate": 0.002, "steps": 5}, "new": "x", "same": [1, {"a": 2}], "list": [1, 2, 3]}
    assert differences(old, new) == [
        "gone: removed (was 1)",
        "list: [1,2] -> [1,2,3]",
        'new: added "x"',
        "train.learning_rate: 0.001 -> 0.002",
    ]


def test_differences_go_into_lists_of_equal_length_and_tell_1_from_1_0():
    assert differences({"a": [{"b": 1}]}, {"a": [{"b": 1.0}]}) == ["a[0].b: 1 -> 1.0"]
    assert differences({"a": [1]}, {"a": [1]}) == []


def test_long_values_are_shortened():
    (line,) = differences({"text": "a" * 500}, {"text": "b"})
    assert len(line) < 150
    assert "502 characters" in line


def test_file_digest_streams_and_does_not_follow_links(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(b"x" * (3 << 20))
    assert file_digest(file) == hashlib.sha256(b"x" * (3 << 20)).hexdigest()
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(OSError, match="link"):
        file_digest(link)
