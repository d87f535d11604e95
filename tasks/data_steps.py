"""The data steps of a run and what identifies them: raw files -> tokenizer -> tokens per dataset -> mixture."""

from __future__ import annotations

from dataclasses import dataclass

from model.config_base import Config, runtime
from tasks.datasets import Dataset, Mixture, Reading, SentencePieceFile, SentencePieceTraining
from tasks.sources import SourceFile, describe_files, find_files
from tasks.steps import Step
from tasks.vocabulary_file import inspect_vocabulary


class RawFiles(Config):
    """A dataset's files by content. Where they were read from is not part of it."""

    files: tuple[SourceFile, ...]
    revision: str | None = None
    paths: tuple[str, ...] = runtime((), description="Where each of `files` is, in their order.")


class VocabularyTraining(Config):
    """A vocabulary to train on the training documents of the upstream raw files, read as `readings` say, in their order."""

    training: SentencePieceTraining
    readings: tuple[Reading, ...]


class VocabularyFile(Config):
    """A vocabulary that exists, by content."""

    sha256: str
    path: str = runtime(..., description="Where the file is.")


class Tokenization(Config):
    """How raw files become tokens: upstream are the raw files and the tokenizer."""

    reading: Reading


class RegisteredTask(Config):
    """A task of SeqIO's registry to tokenize: upstream is the tokenizer, which must be the task's own."""

    task: str
    module: str | None = None
    revision: str | None = None


class Mixing(Config):
    """Shares of the training tokens by dataset name, adding up to 1; a dataset without one is only evaluated."""

    weights: dict[str, float]


@dataclass(frozen=True)
class DataSteps:
    """The data steps of one mixture. `downloads` has none for tasks of SeqIO's registry."""

    downloads: tuple[Step, ...]
    tokenizer: Step
    tokens: tuple[Step, ...]
    mixture: Step


def mixture_steps(mixture: Mixture) -> DataSteps:
    """The steps that make a mixture, with their inputs. Reads every source file once, to identify it by content.

    Raises DataError where a source matches no file or cannot be read, or the tokenizer file is not usable.
    """
    downloads = {dataset.name: _download_step(dataset) for dataset in mixture.datasets if dataset.seqio_task is None}
    tokenizer = _tokenizer_step(mixture, downloads)
    tokens = tuple(_tokens_step(dataset, downloads, tokenizer) for dataset in mixture.datasets)
    total = sum(mixture.weights.values())
    shares = {name: weight / total for name, weight in mixture.weights.items() if weight}
    mixing = Step(kind="mixtures", name=mixture.name, config=Mixing(weights=shares), upstream=(tokenizer, *tokens, *downloads.values()))
    return DataSteps(tuple(downloads.values()), tokenizer, tokens, mixing)


def _download_step(dataset: Dataset) -> Step:
    files = find_files(dataset.name, dataset.sources)
    config = RawFiles(
        files=describe_files(dataset.name, files), revision=dataset.revision, paths=tuple(str(path) for path in files.values())
    )
    return Step(kind="raw", name=dataset.name, config=config)


def _tokenizer_step(mixture: Mixture, downloads: dict[str, Step]) -> Step:
    if isinstance(mixture.tokenizer, SentencePieceFile):
        info = inspect_vocabulary(mixture.tokenizer.path)
        config = VocabularyFile(sha256=info.sha256, path=mixture.tokenizer.path)
        return Step(kind="tokenizers", name=mixture.name, config=config)
    trained = [dataset for dataset in mixture.datasets if mixture.weight_of(dataset.name) > 0]
    return Step(
        kind="tokenizers",
        name=mixture.name,
        config=VocabularyTraining(training=mixture.tokenizer, readings=tuple(dataset.reading for dataset in trained)),
        upstream=tuple(downloads[dataset.name] for dataset in trained),
    )


def _tokens_step(dataset: Dataset, downloads: dict[str, Step], tokenizer: Step) -> Step:
    if dataset.seqio_task is not None:
        config = RegisteredTask(task=dataset.seqio_task, module=dataset.seqio_module, revision=dataset.revision)
        return Step(kind="tokens", name=dataset.name, config=config, upstream=(tokenizer,))
    return Step(
        kind="tokens", name=dataset.name, config=Tokenization(reading=dataset.reading), upstream=(downloads[dataset.name], tokenizer)
    )
