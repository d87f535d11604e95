"""Names of SeqIO and TFDS before a run: mixtures become tasks and shares, a TFDS dataset has an exact version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.seqio_bridge.seqio_names import check_tfds_name, resolve_mixture
from tasks.sources import DataError

CHECKOUT = Path(__file__).resolve().parent.parent
MODULE = """
import seqio

def add(name, source_name="train"):
    vocabulary = seqio.ByteVocabulary()
    source = seqio.TextLineDataSource({source_name: "nowhere.txt"})
    seqio.TaskRegistry.add(name, source=source, preprocessors=[], output_features={"targets": seqio.Feature(vocabulary)})

for name in ("web", "code", "books"):
    add(name)
add("only_test", "test")
seqio.MixtureRegistry.add("inner", [("web", 1.0), ("code", 3.0)])
seqio.MixtureRegistry.add("outer", [("inner", 2.0), ("books", lambda task: float(len(task.name))), ("web", 1.0), ("only_test", 0.0)])
seqio.MixtureRegistry.add("untrainable", [("only_test", 1.0)])
seqio.MixtureRegistry.add("broken", [("web", lambda task: 1 / 0)])
"""


def test_a_mixture_becomes_tasks_and_shares_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_mixtures.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    # web: 1 of inner's 4, times 2, and 1 of its own; code: 3 of 4, times 2; books: the length of its name
    assert resolve_mixture("outer", "their_mixtures") == pytest.approx({"web": 1.5 / 8, "code": 1.5 / 8, "books": 5 / 8})


def test_what_a_mixture_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import seqio

    from tasks.seqio_bridge.seqio_names import registry_rates

    (tmp_path / "their_other_mixtures.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        monkeypatch.setattr(registry, "_REGISTRY", {})
    expected = {
        "web": "seqio_mixture='web' is a task, no mixture; set seqio_task='web' instead",
        "outr": r"seqio_mixture='outr' is not in SeqIO's registry \(did you mean 'outer'\?\)",
        "untrainable": "seqio_task='only_test' has no split 'train', but test",
        "broken": r"seqio_mixture='broken': the rate of task 'web' fails \(ZeroDivisionError",
    }
    for name, message in expected.items():
        with pytest.raises(DataError, match=message):
            registry_rates(name, "their_other_mixtures")
    with pytest.raises(DataError, match="seqio_module='nowhere' cannot be imported"):
        registry_rates("web", "nowhere")


def test_a_tfds_version_must_be_exact_and_the_prepared_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wikipedia/en:1.0.0", "lm1b:1.1.0", "community:my_set:2.0.3"):
        check_tfds_name(name)
    for version in ("1.0.0", "2.1.0", "2.1.0.incompleteX"):
        (tmp_path / "wikipedia" / "en" / version).mkdir(parents=True)
    with pytest.raises(DataError, match=r"write tfds://wikipedia/en:x\.y\.z \(.*en has 1\.0\.0, 2\.1\.0\)"):
        check_tfds_name("wikipedia/en", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"has the version '1\.\*\.\*', which is not an exact one.*has 1\.0\.0, 2\.1\.0"):
        check_tfds_name("wikipedia/en:1.*.*")
    with pytest.raises(DataError, match=r"tfds://lm1b has no version.*tensorflow\.org/datasets lists them"):
        check_tfds_name("lm1b")
    with pytest.raises(DataError, match="a TFDS name is dataset:version or dataset/config:version"):
        check_tfds_name("../up:1.0.0")


def test_asking_imports_no_tensorflow_here() -> None:
    modules = ", ".join(f"tasks.seqio_bridge.{name}" for name in ("seqio_names", "seqio_cache", "tokenize_worker", "mixture_worker"))
    code = f"import sys, {modules}; print({{'tensorflow', 'seqio', 'jax'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
