"""The data steps of a run and what identifies them: raw files -> tokenizer -> tokens per dataset -> mixture."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from model.config_base import Config, runtime
from tasks.mixture_config import Dataset, Mixture, Reading, SimulatedEpoching
from tasks.module_source import module_digest
from tasks.sources import SourceFile, list_files
from tasks.sources.local_files import is_local
from tasks.steps import Step
from tasks.tokenize_config import TokenizeConfig
from tasks.unlisted import stand_in
from tasks.vocabularies import BytePairTraining, ByteTokenizer, SentencePieceTraining, TokenizerFile, TokenizerTraining
from tasks.vocabulary_file import inspect_tokenizer


class RawFiles(Config):
    """A dataset's files by content. Where they were read from is not part of it."""

    files: tuple[SourceFile, ...]
    revision: str | None = None
    licence: str | None = runtime(None)
    homepage: str | None = runtime(None)
    source_bytes: int | None = runtime(None, description="About how much there is, where servers do not tell.")


class VocabularyTraining(Config):
    """A vocabulary to train on the training documents of the upstream raw files, read as `readings` say, in their order.

    holdout_tails: about so many tokens at the end of each are held out; 0: none.
    """

    training: SentencePieceTraining | BytePairTraining
    readings: tuple[Reading, ...]
    holdout_tails: tuple[int, ...]


class VocabularyFile(Config):
    """A vocabulary that exists: by the digest of all that changes an id or, where it is not on this machine yet, by its URL."""

    digest: str | None = None
    url: str | None = None
    declared: dict[str, Any] | None = None
    tokenizer: TokenizerFile | ByteTokenizer = runtime(..., description="Where it is and how it is read.")


class Tokenization(Config):
    """How raw files become tokens: upstream are the raw files and the tokenizer."""

    reading: Reading
    execution: TokenizeConfig = runtime(TokenizeConfig())


class RegisteredTask(Config):
    """A task of SeqIO's registry to tokenize: upstream is the tokenizer, which must be the task's own.

    module_digest: of the module's source, and of what it imports from beside it, so that another preprocessor is another task.
    """

    task: str
    module: str | None = None
    module_digest: str | None = None
    revision: str | None = None


class TfdsTask(Config):
    """A dataset of TFDS to tokenize through SeqIO: `name` pins its version."""

    name: str
    reading: Reading


class Mixing(Config):
    """Shares of the training tokens by dataset name and step; a dataset in no stage is only evaluated."""

    stages: tuple[dict[str, Any], ...]
    packing: str
    max_epochs: dict[str, float]
    holdout_tail: dict[str, int]
    simulated_epoching: SimulatedEpoching | None


@dataclass(frozen=True)
class DataSteps:
    """The data steps of one mixture. `downloads` has none for datasets that SeqIO reads itself; `tags` are by dataset name."""

    downloads: tuple[Step, ...]
    tokenizer: Step
    tokens: tuple[Step, ...]
    mixture: Step
    tags: dict[str, tuple[str, ...]]


def mixture_steps(mixture: Mixture, execution: TokenizeConfig | None = None, *, unlisted: Collection[str] = ()) -> DataSteps:
    """The steps that make a mixture, with their inputs. Reads every local source file once, to identify it by content; lists others.

    unlisted: datasets whose files are not asked for, by name: one file of the declared size stands for them, good for a plan only.

    Raises DataError where a source matches no file or cannot be read, or the tokenizer file is not usable.
    """
    mixture = expanded(mixture)
    downloads = {dataset.name: _download_step(dataset, dataset.name in unlisted) for dataset in mixture.datasets if dataset.has_files}
    tokenizer = _tokenizer_step(mixture, downloads)
    modules = {dataset.seqio_module for dataset in mixture.datasets if dataset.seqio_module is not None}
    digests = {module: module_digest(module) for module in modules}
    tokens = tuple(_tokens_step(dataset, downloads, tokenizer, execution or TokenizeConfig(), digests) for dataset in mixture.datasets)
    config = Mixing(
        stages=mixture.shares(),
        packing=mixture.packing,
        max_epochs=mixture.max_epochs,
        holdout_tail=mixture.holdout_tail,
        simulated_epoching=mixture.simulated_epoching,
    )
    mixing = Step(kind="mixtures", name=mixture.name, config=config, upstream=(tokenizer, *tokens, *downloads.values()))
    tags = {dataset.name: dataset.tags for dataset in mixture.datasets if dataset.tags}
    return DataSteps(tuple(downloads.values()), tokenizer, tokens, mixing, tags)


def expanded(mixture: Mixture) -> Mixture:
    """The mixture with every `seqio_mixture` replaced by its tasks, each a dataset `{name}.{task}` with its share of the weight.

    Raises DataError where SeqIO has no mixture of that name.
    """
    if all(dataset.seqio_mixture is None for dataset in mixture.datasets):
        return mixture
    from tasks.seqio_bridge.seqio_names import resolve_mixture

    datasets: list[Dataset] = []
    shares: dict[str, dict[str, float]] = {}
    for dataset in mixture.datasets:
        if dataset.seqio_mixture is None:
            datasets.append(dataset)
            continue
        rates = resolve_mixture(dataset.seqio_mixture, dataset.seqio_module)
        total = sum(rates.values())
        # SeqIO allows names that cannot name a directory
        names = {task: re.sub(r"[^A-Za-z0-9._-]", "-", f"{dataset.name}.{task}")[-64:].lstrip(".") for task in rates}
        shares[dataset.name] = {names[task]: rate / total for task, rate in rates.items()}
        for task, name in names.items():
            fields = {"seqio_module": dataset.seqio_module, "revision": dataset.revision, "tags": dataset.tags}
            datasets.append(Dataset(name=name, seqio_task=task, **fields))

    def spread(by_name: dict[str, Any], *, divide: bool) -> dict[str, Any]:
        parts = {name: shares.get(name, {name: 1.0}) for name in by_name}
        return {part: by_name[name] * (share if divide else 1) for name in by_name for part, share in parts[name].items()}

    later = [{"step": stage.step, "weights": spread(stage.weights, divide=True)} for stage in mixture.later_weights]
    changed = {
        "datasets": tuple(datasets),
        "weights": spread(mixture.weights, divide=True),
        "later_weights": later,
        "max_epochs": spread(mixture.max_epochs, divide=False),
        "holdout_tail": spread(mixture.holdout_tail, divide=False),
    }
    return Mixture(**{**{name: getattr(mixture, name) for name in Mixture.model_fields}, **changed})


def _download_step(dataset: Dataset, unlisted: bool) -> Step:
    config = RawFiles(
        files=(stand_in(dataset),) if unlisted else list_files(dataset),
        revision=dataset.revision,
        licence=dataset.licence,
        homepage=dataset.homepage,
        source_bytes=dataset.source_bytes,
    )
    return Step(kind="raw", name=dataset.name, config=config)


def _tokenizer_step(mixture: Mixture, downloads: dict[str, Step]) -> Step:
    tokenizer = mixture.tokenizer
    if isinstance(tokenizer, TokenizerTraining):
        trained = [dataset for dataset in mixture.datasets if mixture.is_trained(dataset.name) and dataset.has_files]
        return Step(
            kind="tokenizers",
            name=mixture.name,
            config=VocabularyTraining(
                training=tokenizer,
                readings=tuple(dataset.reading for dataset in trained),
                holdout_tails=tuple(mixture.holdout_tail.get(dataset.name, 0) for dataset in trained),
            ),
            upstream=tuple(downloads[dataset.name] for dataset in trained),
            code_version="2",
        )
    return Step(kind="tokenizers", name=mixture.name, config=vocabulary_file(tokenizer))


def vocabulary_file(tokenizer: TokenizerFile | ByteTokenizer) -> VocabularyFile:
    """What identifies a tokenizer that exists: its content where it can be read now, else its URL and what is declared of it."""
    if isinstance(tokenizer, ByteTokenizer) or is_local(tokenizer.path):
        return VocabularyFile(digest=inspect_tokenizer(tokenizer).digest, tokenizer=tokenizer)
    return VocabularyFile(url=None if tokenizer.sha256 else tokenizer.path, declared=tokenizer.identity(), tokenizer=tokenizer)


def _tokens_step(
    dataset: Dataset, downloads: dict[str, Step], tokenizer: Step, execution: TokenizeConfig, digests: dict[str, str | None]
) -> Step:
    if dataset.seqio_task is not None:
        module = dataset.seqio_module
        config = RegisteredTask(task=dataset.seqio_task, module=module, module_digest=digests.get(module or ""), revision=dataset.revision)
        return Step(kind="tokens", name=dataset.name, config=config, upstream=(tokenizer,))
    if dataset.tfds is not None:
        return Step(kind="tokens", name=dataset.name, config=TfdsTask(name=dataset.tfds, reading=dataset.reading), upstream=(tokenizer,))
    own = Tokenization(reading=dataset.reading, execution=execution)
    return Step(kind="tokens", name=dataset.name, config=own, upstream=(downloads[dataset.name], tokenizer), code_version="2")
