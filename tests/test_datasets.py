"""Datasets, sources and mixtures: what is identity, what is refused, and which steps come out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.data_steps import RawFiles, mixture_steps
from tasks.datasets import DataError, Dataset, Mixture, SentencePieceFile, SentencePieceTraining, check_sources, shakespeare_mixture
from tasks.vocabulary_file import vocabulary_size


def corpus(directory: Path) -> Path:
    for name, text in {"b.txt": "second file\n", "a.txt": "first file\n", "sub/c.txt": "third file\n"}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def mixture(source: object, **changes: Any) -> Mixture:
    fields = {"name": "mix", "datasets": ({"name": "web", "source": source},), "weights": {"web": 1.0}}
    return Mixture.model_validate({**fields, **changes})


def fingerprints(given: Mixture) -> dict[str, str]:
    steps = mixture_steps(given)
    return {f"{step.kind}/{step.name}": step.fingerprint for step in (*steps.downloads, steps.tokenizer, *steps.tokens, steps.mixture)}


def test_the_packaged_mixture_is_whole_and_makes_six_steps() -> None:
    default = shakespeare_mixture()
    check_sources(default)
    steps = mixture_steps(default)
    files = [len(step.config.files) for step in steps.downloads if isinstance(step.config, RawFiles)]
    assert files == [13, 1]
    assert list(fingerprints(default)) == [
        "raw/plays", "raw/sonnets", "tokenizers/shakespeare", "tokens/plays", "tokens/sonnets", "mixtures/shakespeare",
    ]  # fmt: skip
    assert steps.tokenizer.upstream == steps.downloads
    assert [step.upstream for step in steps.tokens] == [(download, steps.tokenizer) for download in steps.downloads]
    assert steps.mixture.upstream == (steps.tokenizer, *steps.tokens, *steps.downloads)


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    here, there = corpus(tmp_path / "here"), corpus(tmp_path / "there")
    first = fingerprints(mixture(str(here / "*.txt")))
    assert fingerprints(mixture(str(there / "*.txt"))) == first
    assert fingerprints(mixture(f"file://{there}/*.txt")) == first
    (there / "b.txt").write_text("second file!\n", encoding="utf-8")
    changed = fingerprints(mixture(str(there / "*.txt")))
    assert all(changed[step] != first[step] for step in first)


def test_each_setting_reaches_just_the_steps_it_decides(tmp_path: Path) -> None:
    base = corpus(tmp_path)
    (base / "other").mkdir()
    (base / "other" / "o.txt").write_text("other text\n", encoding="utf-8")

    def made(weights: dict[str, float], *, vocab_size: int = 2048, **web: Any) -> dict[str, str]:
        datasets = [Dataset(name="web", source=str(base / "*.txt"), **web), Dataset(name="other", source=str(base / "other" / "*"))]
        return fingerprints(
            Mixture(name="mix", datasets=tuple(datasets), weights=weights, tokenizer=SentencePieceTraining(vocab_size=vocab_size))
        )

    def changed(after: dict[str, str]) -> set[str]:
        return {step for step in first if first[step] != after[step]}

    first = made({"web": 0.5, "other": 0.5})
    assert changed(made({"web": 2.0, "other": 2.0})) == set()
    assert changed(made({"web": 0.6, "other": 0.4})) == {"mixtures/mix"}
    below = {"tokenizers/mix", "tokens/web", "tokens/other", "mixtures/mix"}
    assert changed(made({"web": 0.5, "other": 0.5}, vocab_size=1024)) == below
    assert changed(made({"web": 0.5, "other": 0.5}, document="line")) == below
    assert changed(made({"web": 0.5, "other": 0.5}, revision="2")) == below | {"raw/web"}


def test_a_tokenizer_file_is_identified_by_content_and_a_dataset_then_stands_alone(tmp_path: Path) -> None:
    from tests.synthetic_vocabulary import small_vocabulary

    base = corpus(tmp_path)
    for name in ("one.model", "two.model"):
        (tmp_path / name).write_bytes(small_vocabulary())
    first = mixture(str(base / "*.txt"), tokenizer=SentencePieceFile(path=str(tmp_path / "one.model")))
    check_sources(first)
    assert vocabulary_size(first.tokenizer) == 400
    assert fingerprints(first) == fingerprints(first.model_copy(update={"tokenizer": SentencePieceFile(path=str(tmp_path / "two.model"))}))
    steps = mixture_steps(first)
    assert steps.tokenizer.upstream == ()
    (tmp_path / "one.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"one\.model' has no bytes"):
        check_sources(first)
    (tmp_path / "one.model").write_bytes(b"not a model at all")
    with pytest.raises(DataError, match=r"one\.model' is not a SentencePiece model"):
        check_sources(first)
    (tmp_path / "one.model").unlink()
    with pytest.raises(DataError, match=r"one\.model' cannot be read \(No such file"):
        vocabulary_size(first.tokenizer)


def test_sources_that_cannot_work_are_refused_with_a_remedy(tmp_path: Path) -> None:
    base = corpus(tmp_path / "x")
    (base / "empty").mkdir()
    (base / "empty" / "e.txt").touch()
    cases = {
        str(base / "*.json"): r"matches no file below .*/x; correct the pattern",
        str(tmp_path / "y" / "*.txt"): r"there is no directory .*/y; correct the path",
        str(base): r"is a directory; write a glob for its files, such as .*/x/\*\.txt",
        "file://elsewhere/x.txt": "names the host 'elsewhere'",
        "package:../secret": "must be a glob below the packaged texts",
        str(base / "empty" / "*"): r"its 1 source file\(s\) are all empty, .*e\.txt",
        str(base / "**" / "*.txt"): r"e\.txt has no bytes; remove it, or set on_bad_document='skip'",
    }
    for source, words in cases.items():
        with pytest.raises(DataError, match=f"dataset 'web'.*{words}"):
            check_sources(mixture(source))
    os.mkfifo(base / "pipe.txt")
    with pytest.raises(DataError, match="is no regular file"):
        check_sources(mixture(str(base / "pipe.txt")))
    check_sources(mixture(str(base / "*.txt")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {"wen": 1.0}}, r"mixture.weights names 'wen', which is no dataset of it \(did you mean 'web'\?\)"),
        ({"weights": {"web": 0.0}}, "has no weight above 0"),
        ({"weights": {"web": -1.0}}, r"mixture.weights\['web'\]=-1.0"),
        ({"weights": {"web": float("inf")}}, r"mixture.weights\['web'\]=inf"),
        ({"datasets": ({"name": "web", "source": "x"}, {"name": "web", "source": "y"})}, "several datasets named 'web'"),
        ({"datasets": ({"name": "web", "source": "x"}, {"name": "wiki", "source": "y"})}, "'wiki' has no weight and no holdout"),
        ({"datasets": ({"name": "../web", "source": "x"},)}, "dataset.name='../web'"),
        ({"datasets": ({"name": "web"},)}, "dataset 'web' has no source"),
        ({"datasets": ({"name": "web", "source": "x", "seqio_task": "t"},)}, "both source and seqio_task='t'"),
        ({"datasets": ({"name": "web", "seqio_task": "t", "holdout": 0.1},)}, "holdout=0.1 with seqio_task"),
        ({"datasets": ({"name": "web", "source": "x", "seqio_module": "m"},)}, "seqio_module='m' without seqio_task"),
        ({"datasets": ({"name": "web", "seqio_task": "t"},)}, "set mixture.tokenizer to SentencePieceFile"),
        ({"datasets": ({"name": "web", "source": "x", "min_document_bytes": 9},)}, "min_document_bytes=9 joins paragraphs"),
        ({"datasets": ({"name": "web", "source": "x", "tex_key": "t"},)}, r"no field 'tex_key' \(did you mean 'text_key'\?\)"),
        ({"name": "a b"}, "mixture.name='a b'"),
        ({"datasets": ({"name": "web", "source": "x", "tags": ("a//b",)},)}, "dataset 'web' has the tag 'a//b'"),
        (
            {"datasets": ({"name": "web", "source": "x", "tags": ("own", "web")}, {"name": "own", "source": "y", "holdout": 1.0})},
            "dataset 'web' has the tag 'own', which is the name of another",
        ),
        ({"datasets": ({"name": "web", "source": "https://me:word@host/x.txt"},)}, r"a password or a signature in it.* write \$\{NAME\}"),
        ({"datasets": ({"name": "web", "source": "https://host/x.txt?X-Amz-Signature=1"},)}, "a password or a signature in it"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixture("x", **changes)


def test_declaring_data_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tasks.data_steps import mixture_steps; from tasks.datasets import shakespeare_mixture; "
        "mixture_steps(shakespeare_mixture()); "
        "print([name for name in ('tensorflow', 'seqio', 'jax', 'prefect', 'sentencepiece') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "[]"


def test_a_format_that_is_not_read_is_refused_before_the_download(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    table = Dataset(name="web", source=str(tmp_path / "*.csv"))
    with pytest.raises(DataError, match=r"a\.csv: its name ends with \.csv.*set format='txt'"):
        check_sources(Mixture(name="mix", datasets=(table,), weights={"web": 1.0}))
    as_text = table.model_copy(update={"format": "txt"})
    check_sources(Mixture(name="mix", datasets=(as_text,), weights={"web": 1.0}))
