"""Data as an experiment's file declares it, under the guide's names: download, tokenize, mix. Nothing is done until a run needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from model.config_base import Config
from tasks.catalogue import llama3_tokenizer, paloma
from tasks.mixture_config import Chat, Dataset, Mixture, PromptCompletion, Reading
from tasks.sources.local_files import is_local
from tasks.vocabularies import HuggingFaceFile, SentencePieceFile, TiktokenFile, Tokenizer

# Names on the hub under which the guide's scripts know the tokenizer of Llama 3.
_LLAMA3 = ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "marin-community/marin-tokenizer")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class TokenizedDataset(Config):
    """A dataset with the tokenizer that it is to be read with: one component of a mixture, or all of it."""

    dataset: Dataset
    tokenizer: Tokenizer


def default_download(name: str, hf_dataset_id: str, revision: str, hf_urls_glob: Sequence[str] = (), **reading: Any) -> Dataset:
    """Files of a dataset on the Hugging Face hub, at a commit.

    Args:
        hf_urls_glob: which files, as globs from the repository's root.
        reading: how they become documents, and what else `Dataset` says of them (`text_key`, `format`, `licence`, ...).

    Raises:
        ValueError: no glob, or a field that contradicts another.
    """
    if not hf_urls_glob:
        raise ValueError(f"default_download({name!r}): hf_urls_glob=() names no file of {hf_dataset_id}: give globs such as '**/*.parquet'")
    sources = tuple(f"hf://datasets/{hf_dataset_id}@{revision}/{glob}" for glob in hf_urls_glob)
    homepage = f"https://huggingface.co/datasets/{hf_dataset_id}"
    return Dataset(name=name, source=sources, revision=revision, **{"homepage": homepage, **reading})


def default_tokenize(
    name: str,
    dataset: Dataset | str | Sequence[str],
    tokenizer: Tokenizer | str,
    format: Reading | PromptCompletion | Chat | None = None,
    *,
    is_validation: bool = False,
) -> TokenizedDataset:
    """A dataset to be tokenized.

    Args:
        name: of the component, in weights, metrics and directories.
        dataset: what `default_download` gave or a dataset of `tasks.datasets`, or sources: paths, globs, URLs.
        tokenizer: a configuration, a file, or the name of Llama 3's on the hub.
        format: how files become documents, or which keys hold questions and answers. None: as the dataset says.
        is_validation: all of it is held out, and it is only evaluated.

    Raises:
        ValueError: the dataset or the tokenizer is a name of the hub that says no revision.
    """
    if isinstance(dataset, Dataset):
        fields: dict[str, Any] = {field: getattr(dataset, field) for field in Dataset.model_fields}
    else:
        sources = (dataset,) if isinstance(dataset, str) else tuple(dataset)
        for source in sources:
            _refuse_hub_name(name, source)
        fields = {"source": sources}
    if isinstance(format, Reading):
        fields |= {field: getattr(format, field) for field in Reading.model_fields}
    elif format is not None:
        fields["answers"] = format
    if is_validation:
        fields["holdout"] = 1.0
    return TokenizedDataset(dataset=Dataset(**{**fields, "name": name}), tokenizer=tokenizer_named(tokenizer))


def _refuse_hub_name(name: str, source: str) -> None:
    if is_local(source) and _HUB_NAME.fullmatch(source) and not re.search(r"\.(txt|json|jsonl|parquet|gz|zst|xz|bz2)$", source):
        raise ValueError(
            f"default_tokenize({name!r}): {source!r} is a name on the hub without a commit, or a directory: give "
            f"default_download(..., hf_dataset_id={source!r}, revision=...), or a glob of files"
        )


def tokenizer_named(tokenizer: Tokenizer | str) -> Tokenizer:
    """A tokenizer by its configuration, by its file, or by the name of Llama 3's on the hub.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    if tokenizer in _LLAMA3:
        return llama3_tokenizer
    for ending, kind in ((".json", HuggingFaceFile), (".tiktoken", TiktokenFile), (".model", SentencePieceFile)):
        if tokenizer.endswith(ending):
            return kind(path=tokenizer)
    raise ValueError(
        f"tokenizer={tokenizer!r} is not known by name: give {_LLAMA3[0]!r}, a file (tokenizer.json, *.model, *.tiktoken), or "
        f"HuggingFaceFile(path='hf://{tokenizer}@REVISION/tokenizer.json', vocab_size=...)"
    )


def lm_mixture_data_config(
    components: Mapping[str, TokenizedDataset | Dataset],
    weights: Mapping[str, float],
    *,
    name: str = "mixture",
    tokenizer: Tokenizer | str | None = None,
    missing_weights_are_validation: bool = True,
    **others: Any,
) -> Mixture:
    """A mixture of datasets by name.

    Args:
        weights: rates by name, on any scale; without one, or with 0, a dataset is only evaluated.
        tokenizer: None: that of the components.
        missing_weights_are_validation: off refuses components without a weight.
        others: further fields of `Mixture`, such as `holdout_tail` or `max_epochs`.

    Raises:
        ValueError: tokenizers differ or there is none, or a weight is missing.
    """
    tokenizers = {name: part.tokenizer for name, part in components.items() if isinstance(part, TokenizedDataset)}
    if tokenizer is not None:
        tokenizers["tokenizer"] = tokenizer_named(tokenizer)
    if not tokenizers:
        raise ValueError(f"mixture {name!r} has no tokenizer: give it, or components made by default_tokenize")
    first, chosen = next(iter(tokenizers.items()))
    for other, theirs in tokenizers.items():
        if theirs != chosen:
            raise ValueError(f"mixture {name!r}: {other!r} has another tokenizer than {first!r}; a mixture is read with one, so choose it")
    if not missing_weights_are_validation and (missing := [part for part in components if part not in weights]):
        raise ValueError(f"mixture {name!r}: {missing[0]!r} has no weight; give it one, or missing_weights_are_validation=True")
    datasets = tuple(_component(name, part) for name, part in components.items())
    return Mixture(name=name, datasets=datasets, weights=dict(weights), tokenizer=chosen, **others)


def _component(name: str, part: TokenizedDataset | Dataset) -> Dataset:
    dataset = part.dataset if isinstance(part, TokenizedDataset) else part
    return dataset if dataset.name == name else dataset.model_copy(update={"name": name})


def as_mixture(tokenized: Mixture | TokenizedDataset) -> Mixture:
    """The mixture itself, or that of one dataset. Raises ValueError where it is neither."""
    if isinstance(tokenized, Mixture):
        return tokenized
    if not isinstance(tokenized, TokenizedDataset):
        raise ValueError(f"tokenized={tokenized!r:.60}: give a mixture, or what default_tokenize returned")
    name = tokenized.dataset.name
    return lm_mixture_data_config({name: tokenized}, {name: 1.0}, name=name)


def interpolate_mixture_configs(mixtures: Sequence[Mixture], weights: Sequence[float], *, name: str | None = None) -> Mixture:
    """One mixture between several: each dataset's share is the mean of its shares in them, weighted by `weights`.

    Args:
        name: of the mixture. None: that of the first.

    Raises:
        ValueError: their number is not that of the weights; tokenizers, packing, a dataset of one name or its limits differ; or rates
            change by step.
    """
    if len(mixtures) != len(weights) or not mixtures:
        raise ValueError(f"interpolate_mixture_configs has {len(mixtures)} mixtures and {len(weights)} weights: give one for each")
    first = mixtures[0]
    datasets: dict[str, Dataset] = {}
    shares: dict[str, float] = {}
    limits: dict[str, dict[str, Any]] = {field: {} for field in _LIMITS}
    for mixture, weight in zip(mixtures, weights, strict=True):
        for field in ("tokenizer", "packing", "simulated_epoching"):
            if getattr(mixture, field) != getattr(first, field):
                raise ValueError(f"mixtures {first.name!r} and {mixture.name!r} differ in {field}: nothing lies between; make them equal")
        if mixture.later_weights:
            raise ValueError(f"mixture {mixture.name!r} has later_weights: interpolate the mixtures of each stage by itself")
        for dataset in mixture.datasets:
            if datasets.setdefault(dataset.name, dataset) != dataset:
                raise ValueError(f"mixtures have different datasets named {dataset.name!r}: rename one")
        for field in _LIMITS:
            for dataset, limit in getattr(mixture, field).items():
                if limits[field].setdefault(dataset, limit) != limit:
                    raise ValueError(
                        f"mixtures have different {field} of {dataset!r}, {limits[field][dataset]} and {limit} (in {mixture.name!r}): "
                        "make them equal"
                    )
        for part, share in mixture.shares()[0]["shares"].items():
            shares[part] = shares.get(part, 0.0) + weight * share
    changed = {"name": name or first.name, "datasets": tuple(datasets.values()), "weights": shares, **limits}
    return Mixture(**{**dict(first), **changed})


_LIMITS = ("max_epochs", "holdout_tail")


def with_default_validation(mixture: Mixture, wanted: bool | None = None) -> Mixture:
    """The mixture with the sets of Paloma that it lacks, which are only evaluated.

    wanted: None: where all that is trained on has to be downloaded too. On files of one's own a run then needs no network.
    """
    if wanted is None:
        trained = [dataset for dataset in mixture.datasets if mixture.is_trained(dataset.name)]
        wanted = all(dataset.has_files and not any(map(is_local, dataset.sources)) for dataset in trained)
    there = {dataset.name for dataset in mixture.datasets}
    missing = tuple(dataset for dataset in paloma.values() if dataset.name not in there)
    return Mixture(**{**dict(mixture), "datasets": (*mixture.datasets, *missing)}) if wanted and missing else mixture
