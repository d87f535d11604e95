"""Opened mixtures: stages, tails, what is malformed, stores and tokenizers that are not the mixture's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.mixture_store import MixtureStore
from model.token_store import StoreError
from tests.synthetic_stores import Placed, write_mixture


def changed(mixture: Placed, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = Path(mixture.path) / "mixture.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path.parent


def test_what_a_mixture_says(tmp_path: Path) -> None:
    mixture = MixtureStore.open(
        write_mixture(
            tmp_path,
            {"plays": 3.0, "wiki": 0.0, "code": 1.0},
            later={100: {"code": 1.0}},
            packing="best_fit",
            max_epochs={"code": 2.5},
            simulated_epoching={"experiment_tokens": 10, "target_tokens": 40},
        )
    )
    assert [(stage.step, dict(stage.shares)) for stage in mixture.stages] == [(0, {"plays": 0.75, "code": 0.25}), (100, {"code": 1.0})]
    assert [component.name for component in mixture.trained()] == ["plays", "code"]
    assert mixture.validation_names() == ("plays", "wiki", "code")
    assert mixture.packing == "best_fit"
    assert mixture.component("code").max_epochs == 2.5
    assert mixture.component("plays").max_epochs is None
    assert mixture.simulated_epoching is not None
    assert mixture.simulated_epoching.target_tokens == 40
    with pytest.raises(StoreError, match="no component 'poems'; it has plays, wiki, code"):
        mixture.component("poems")


def test_the_tail_moves_from_training_to_validation(tmp_path: Path) -> None:
    plain = MixtureStore.open(write_mixture(tmp_path / "a", {"plays": 1.0})).component("plays")
    cut = MixtureStore.open(write_mixture(tmp_path / "b", {"plays": 1.0}, tails={"plays": 100})).component("plays")
    parts = [(one.split("train"), one.split("validation")) for one in (plain, cut)]
    (train, validation), (less, more) = parts
    assert train is not None
    assert validation is not None
    assert less is not None
    assert more is not None
    assert 100 <= train.num_tokens - less.num_tokens < 100 + 62
    assert more.num_tokens - validation.num_tokens == train.num_tokens - less.num_tokens
    assert less.source_bytes + more.source_bytes == train.source_bytes + validation.source_bytes
    assert cut.store.splits["train"].num_tokens == train.num_tokens
    with pytest.raises(
        StoreError, match=r"component 'plays' has \d+ training tokens, and a tail of 1000000 leaves none; lower holdout_tail"
    ):
        MixtureStore.open(write_mixture(tmp_path / "c", {"plays": 1.0}, tails={"plays": 10**6}))


def test_a_store_or_tokenizer_that_is_not_the_mixtures_is_refused(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"plays": 1.0})
    path = changed(mixture, lambda value: value["tokenizer"].update(digest="u" * 64))
    with pytest.raises(StoreError, match="'plays' was tokenized with tttttttttttttttt, the mixture's tokenizer is uuuuuuuuuuuuuuuu"):
        MixtureStore.open(path)
    path = changed(mixture, lambda value: value["components"][0].update(fingerprint="e" * 64))
    with pytest.raises(StoreError, match="the mixture was made of eeeeeeeeeeeeeeee"):
        MixtureStore.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("stages"),
        lambda value: value.update(stages=[]),
        lambda value: value.update(stages=[{"step": 5, "shares": {"plays": 1.0}}]),
        lambda value: value["stages"].append({"step": 0, "shares": {"plays": 1.0}}),
        lambda value: value["stages"][0].update(shares={"other": 1.0}),
        lambda value: value["stages"][0].update(shares={"plays": -1.0}),
        lambda value: value["stages"][0].update(shares={"plays": 0.0}),
        lambda value: value.update(packing="first_fit"),
        lambda value: value["components"][0].update(max_epochs=0),
        lambda value: value.update(simulated_epoching={"experiment_tokens": 3, "target_tokens": 2}),
        lambda value: value["tokenizer"].pop("digest"),
    ],
)
def test_what_is_malformed_is_said_to_be(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(StoreError, match=r"mixture\.json is malformed .*run the mixture step again"):
        MixtureStore.open(changed(write_mixture(tmp_path, {"plays": 1.0}), change))


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"plays": 1.0})
    with pytest.raises(StoreError, match=r"tokenizer .*tokenizer is missing; run the tokenizer step again"):
        MixtureStore.open(mixture).tokenizer.check()
    (Path(mixture.path) / "mixture.json").write_text("[]", encoding="utf-8")
    with pytest.raises(StoreError, match="is malformed"):
        MixtureStore.open(mixture)
    (Path(mixture.path) / "mixture.json").unlink()
    with pytest.raises(StoreError, match=r"mixture\.json is missing; run the mixture step again"):
        MixtureStore.open(mixture)


def test_a_tokenizer_of_another_digest_is_refused(tmp_path: Path) -> None:
    from model.vocabularies.vocabulary import Vocabulary

    vocabulary = Vocabulary.open_bytes()
    mixture = write_mixture(tmp_path, {"plays": 1.0})
    directory = Path(mixture.path) / "tokenizer"
    directory.mkdir()
    vocabulary.write(directory)
    with pytest.raises(StoreError, match=f"has the digest {vocabulary.digest}, the tokens were made with tttt"):
        MixtureStore.open(mixture).tokenizer.check()
    (directory / "vocabulary.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match=r"cannot be used .*run the tokenizer step again"):
        MixtureStore.open(mixture).tokenizer.check()
