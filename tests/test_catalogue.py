"""The catalogue: every entry is whole and pinned, no name is there twice, and declaring them costs and reaches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import catalogue
from tasks.mixture_config import Dataset, Mixture
from tasks.sources.hub_files import hub_place

CHECKOUT = Path(__file__).resolve().parent.parent
COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
ENDINGS = {"jsonl": (".jsonl.zst", ".jsonl.zstd", ".jsonl.gz", ".json.gz"), "parquet": (".parquet",)}
WHOLE = tuple(value for value in vars(catalogue).values() if isinstance(value, Dataset))
PARTS = (*catalogue.dolma_parts.values(), *catalogue.nemotron_cc_parts.values())
EVERY = (*WHOLE, *PARTS, *catalogue.paloma.values())


def test_all_corpora_are_there() -> None:
    assert {dataset.name for dataset in WHOLE} == {
        *("dclm_baseline", "starcoderdata", "proofpile_2", "dolma", "nemotron_cc"),
        *("fineweb", "fineweb_edu", "slimpajama_627b", "slimpajama_6b"),
    }
    assert all(getattr(catalogue, dataset.name) is dataset for dataset in WHOLE)
    assert len(catalogue.paloma) == 16
    assert len(catalogue.dolma_parts) == 15
    assert len(catalogue.nemotron_cc_parts) == 7


@pytest.mark.parametrize("dataset", EVERY, ids=lambda dataset: dataset.name)
def test_entry_is_whole_and_pinned(dataset: Dataset) -> None:
    assert dataset.revision is not None
    assert dataset.licence
    assert dataset.format in ("jsonl", "parquet")
    assert dataset.on_bad_document == "skip"
    for source in dataset.sources:
        scheme, rest = source.split("://")
        if scheme == "hf":
            repository = f"datasets/{dataset.homepage.rsplit('/datasets/')[1]}" if dataset.homepage else ""
            assert COMMIT.fullmatch(dataset.revision)
            assert rest.startswith(f"{repository}@{dataset.revision}/")
        else:
            assert SHA256.fullmatch(dataset.revision)
        if "#" in source:  # a list of files: its content is pinned, too
            name = source.split("#")[0].rsplit("/")[-1]
            assert SHA256.fullmatch(dataset.sha256[name])
        assert source.endswith(ENDINGS[dataset.format])
    assert Dataset.model_validate(dataset.model_dump()) == dataset


@pytest.mark.parametrize(
    "source", [s for dataset in EVERY for s in dataset.sources if s.startswith("hf://")] + [catalogue.llama3_tokenizer.path]
)
def test_hub_sources_name_files_at_a_commit(source: str) -> None:
    place = hub_place(source.split("#")[0])
    assert place.is_pinned
    assert place.path


def test_names_are_unique_and_may_stand_together() -> None:
    names = [dataset.name for dataset in EVERY]
    assert len(set(names)) == len(names)
    Mixture(name="all", datasets=EVERY, weights={dataset.name: 1.0 for dataset in (*WHOLE, *PARTS)})


@pytest.mark.parametrize("corpus", ["dolma", "nemotron_cc"])
def test_parts_read_from_the_list_of_the_whole(corpus: str) -> None:
    whole, parts = getattr(catalogue, corpus), getattr(catalogue, f"{corpus}_parts")
    (prefix,) = {source.split("#")[0] for source in whole.sources}
    assert {source.split("#")[0] for part in parts.values() for source in part.sources} == {prefix}
    globs = [source.split("#")[1] for part in parts.values() for source in part.sources]
    assert len(set(globs)) == len(globs)
    assert {part.revision for part in parts.values()} == {whole.revision}
    mixture = Mixture(name=corpus, datasets=tuple(parts.values()), weights=dict(getattr(catalogue, f"{corpus}_weights")))
    assert all(mixture.is_trained(part.name) for part in parts.values())


def test_dclm_mixture() -> None:
    mixture = catalogue.dclm_mixture_config_llama3
    assert isinstance(mixture, Mixture)
    (stage,) = mixture.shares()
    assert {name: round(100 * share, 2) for name, share in stage["shares"].items()} == {
        "dclm_baseline": 92.57,
        "starcoderdata": 6.09,
        "proofpile_2": 1.34,
    }
    evaluated = [dataset for dataset in mixture.datasets if not mixture.is_trained(dataset.name)]
    assert evaluated == list(catalogue.paloma.values())
    assert all(dataset.holdout == 1 and "/val/" in str(dataset.source) for dataset in evaluated)
    assert mixture.tokenizer is catalogue.llama3_tokenizer
    assert catalogue.llama3_tokenizer.vocab_size == 128_256
    assert re.search(r"@[0-9a-f]{40}/tokenizer\.json$", catalogue.llama3_tokenizer.path)


def test_listing_for_people() -> None:
    entries = catalogue.catalogue()
    assert {entry.name for entry in entries[: len(WHOLE)]} == {dataset.name for dataset in WHOLE}
    assert [entry.name for entry in entries[len(WHOLE) :]] == [dataset.name for dataset in catalogue.paloma.values()]
    assert all(entry.source_bytes > 1_000_000 and entry.licence and entry.homepage.startswith("https://") for entry in entries)
    assert all(entry.tokens for entry in entries if not entry.name.startswith("paloma_"))
    code = next(entry for entry in entries if entry.name == "starcoderdata")
    assert (code.text_key, code.revision) == ("content", catalogue.starcoderdata.revision)


def test_declaring_reaches_no_network_and_imports_nothing_heavy() -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import tasks.catalogue\n"
        "tasks.catalogue.catalogue()\n"
        "heavy = {'tensorflow', 'seqio', 'jax', 'numpy', 'pyarrow', 'prefect', 'huggingface_hub', 'tokenizers', 'fsspec', 'httpx'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
