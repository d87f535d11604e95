"""A step's fingerprint holds what decides its result, and a miss is explained by the field that changed."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from model.config_base import Config, runtime
from tasks.artifacts import commit, discard_manifest
from tasks.steps import Step


class Reading(Config):
    source: str = "plays"
    learning_rate: float = 0.001
    workers: int = runtime(2)


def committed(step: Step, root: Path, text: str = "data") -> Path:
    directory = step.directory(root)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data.txt").write_text(text)
    commit(directory, step, stats={})
    return directory


def chain(**fields) -> tuple[Step, Step]:
    raw = Step("raw", "plays", Reading(**fields))
    return raw, Step("tokens", "plays", Reading(), upstream=(raw,))


def test_fingerprint_follows_identity_kind_name_upstream_and_code_version():
    raw, tokens = chain()
    others = [
        Step("raw2", "plays", Reading()),
        Step("raw", "other", Reading()),
        Step("raw", "plays", Reading(source="x")),
        Step("raw", "plays", Reading(), code_version="2"),
        Step("raw", "plays", Reading(), upstream=(tokens,)),
    ]
    assert len({raw.fingerprint, tokens.fingerprint, *(step.fingerprint for step in others)}) == 7
    assert chain(source="x")[1].fingerprint != tokens.fingerprint


def test_runtime_fields_change_neither_fingerprint_nor_equality():
    assert Step("raw", "plays", Reading(workers=9)).fingerprint == Step("raw", "plays", Reading()).fingerprint
    assert Step("raw", "plays", Reading(workers=9)) == Step("raw", "plays", Reading())
    assert Step("raw", "plays", Reading(source="x")) != Step("raw", "plays", Reading())


def test_fingerprint_is_pinned():
    """Changing this constant makes every user's artifacts be built again."""
    step = Step("raw", "plays", Reading())
    assert step.fingerprint == "02b7f6cbee6be57c81d0fe4987c30598b6c958e4de6f3be08df98f771d8749b5"


def test_fingerprint_survives_pickling():
    step = chain()[1]
    assert pickle.loads(pickle.dumps(step)).fingerprint == step.fingerprint


def test_directories(tmp_path: Path):
    raw, tokens = chain()
    export = Step("hf", "plays", Reading(), upstream=(tokens,), subdirectory_of=tokens)
    assert raw.directory(tmp_path) == tmp_path / "raw" / f"plays-{raw.fingerprint[:16]}"
    assert export.directory(tmp_path) == tmp_path / "tokens" / f"plays-{tokens.fingerprint[:16]}" / "hf"


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../x", "a b", "x" * 65, "a\n", "\u00e9", "a\0"])
def test_hostile_names_are_refused(name: str):
    with pytest.raises(ValueError, match="names a directory"):
        Step("raw", name, Reading())
    with pytest.raises(ValueError, match="a step's kind"):
        Step(name, "plays", Reading())


def test_first_run(tmp_path: Path):
    raw, _ = chain()
    assert raw.explain_miss(tmp_path) == "first run of this step"
    assert not raw.is_committed(tmp_path)
    committed(raw, tmp_path)
    assert raw.explain_miss(tmp_path) == ""
    assert raw.is_committed(tmp_path)


def test_a_changed_field_is_named_with_both_values(tmp_path: Path):
    committed(chain()[0], tmp_path)
    assert chain(learning_rate=0.002)[0].explain_miss(tmp_path) == "learning_rate: 0.001 -> 0.002"


def test_a_changed_upstream_step_is_named_with_its_own_change(tmp_path: Path):
    for step in chain():
        committed(step, tmp_path)
    assert chain(source="novels")[1].explain_miss(tmp_path) == 'rebuilt because raw/plays changed (source: "plays" -> "novels")'


def test_added_and_removed_inputs_are_named(tmp_path: Path):
    raw, tokens = chain()
    committed(tokens, tmp_path)
    more = Step("tokens", "plays", Reading(), upstream=(raw, Step("tokenizers", "small", Reading())))
    assert more.explain_miss(tmp_path) == "rebuilt because tokenizers/small changed"
    committed(more, tmp_path)
    os.utime(more.directory(tmp_path) / "manifest.json", (2e9, 2e9))
    assert Step("tokens", "plays", Reading()).explain_miss(tmp_path) == "rebuilt because 2 of its inputs were removed"


def test_a_changed_code_version_is_named(tmp_path: Path):
    committed(chain()[0], tmp_path)
    assert Step("raw", "plays", Reading(), code_version="2").explain_miss(tmp_path) == "code_version: 1 -> 2"


def test_the_newest_earlier_artifact_of_the_same_name_is_compared(tmp_path: Path):
    old, new = chain(learning_rate=0.1)[0], chain(learning_rate=0.2)[0]
    os.utime(committed(new, tmp_path) / "manifest.json", (2_000, 2_000))
    os.utime(committed(old, tmp_path) / "manifest.json", (1_000, 1_000))
    committed(Step("raw", "plays-longer", Reading(learning_rate=0.3)), tmp_path)
    step = chain(learning_rate=0.4)[0]
    earlier = step.closest_earlier(tmp_path)
    assert earlier is not None
    assert earlier.fingerprint == new.fingerprint
    assert step.explain_miss(tmp_path) == "learning_rate: 0.2 -> 0.4"


def test_an_export_inside_a_checkpoint_finds_earlier_exports(tmp_path: Path):
    def export(dtype: str) -> Step:
        training = Step("checkpoints", "tiny", Reading(source=dtype))
        return Step("hf", "tiny", Reading(source=dtype), upstream=(training,), subdirectory_of=training)

    committed(export("float32"), tmp_path)
    assert export("bfloat16").explain_miss(tmp_path).startswith('source: "float32" -> "bfloat16"; rebuilt because checkpoints/tiny changed')


def test_damage_is_named(tmp_path: Path):
    raw, _ = chain()
    (committed(raw, tmp_path) / "data.txt").write_text("longer than before")
    assert raw.explain_miss(tmp_path) == "its files are damaged: data.txt has 18 bytes instead of 4"


def test_a_torn_manifest_is_named(tmp_path: Path):
    raw, _ = chain()
    manifest = committed(raw, tmp_path) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    assert raw.explain_miss(tmp_path) == "its files are damaged: manifest.json is not JSON (torn or overwritten)"


def test_the_reason_of_a_discarded_manifest_is_repeated_until_it_is_written_anew(tmp_path: Path):
    raw, _ = chain()
    directory = committed(raw, tmp_path)
    discard_manifest(directory, "its files are damaged: data.txt is missing")
    assert raw.explain_miss(tmp_path) == "its files are damaged: data.txt is missing"
    committed(raw, tmp_path)
    assert raw.explain_miss(tmp_path) == ""


def test_an_unfinished_run_is_told(tmp_path: Path):
    raw, _ = chain()
    raw.directory(tmp_path).mkdir(parents=True)
    assert raw.explain_miss(tmp_path) == "first run of this step"
    (raw.directory(tmp_path) / "part").write_text("x")
    assert raw.explain_miss(tmp_path) == "an earlier run of this step did not finish: it continues"
    committed(chain(learning_rate=0.5)[0], tmp_path)
    assert raw.explain_miss(tmp_path) == "learning_rate: 0.5 -> 0.001; continues an unfinished run"


def test_planning_imports_no_orchestrator_and_no_framework():
    modules = "tasks.steps, tasks.artifacts, tasks.audit, tasks.leases"
    code = f"import sys, {modules}; print({{'prefect', 'jax', 'tensorflow', 'numpy'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
