"""What a run is trained on: datasets, the tokenizer, and the mixture with its rates. Plain configuration, no heavy import."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, model_validator

from model.config_base import Config, nearest, runtime
from tasks.sources import DataError, check_readable, find_files
from tasks.vocabulary_file import inspect_vocabulary

__all__ = [
    "DataError",
    "Dataset",
    "Mixture",
    "Reading",
    "SentencePieceFile",
    "SentencePieceTraining",
    "Tokenizer",
    "check_name",
    "check_sources",
    "shakespeare_mixture",
]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class Reading(Config):
    """How documents are read out of a dataset's files, and which of them are held out."""

    format: Literal["txt", "jsonl"] = Field(default="txt", description="Plain text, or one JSON object a line.")
    text_key: str = Field(default="text", min_length=1, description="The key of a jsonl object that holds the text.")
    document: Literal["file", "line", "paragraph"] = Field(
        default="file", description="What a document of a txt file is: the file, each line, or paragraphs (blocks between blank lines)."
    )
    min_document_bytes: int = Field(
        default=0, ge=0, description="Paragraphs are joined, with a blank line between, until they have so many bytes."
    )
    max_document_bytes: int = Field(default=16 << 20, ge=1, description="Longer documents are bad ones; none is ever read whole.")
    on_bad_document: Literal["fail", "skip"] = Field(
        default="fail", description="Stop at a document that is too long or undecodable or lacks its text, or skip and count it."
    )
    holdout: float = Field(
        default=0.0, ge=0, le=0.5, description="Share of the documents held out for validation, chosen by a hash of the text."
    )

    @model_validator(mode="after")
    def _check_reading(self) -> Reading:
        if self.min_document_bytes and (self.format, self.document) != ("txt", "paragraph"):
            raise ValueError(f"min_document_bytes={self.min_document_bytes} joins paragraphs: set format='txt' and document='paragraph'")
        if self.min_document_bytes > self.max_document_bytes:
            raise ValueError(f"min_document_bytes={self.min_document_bytes} is above max_document_bytes={self.max_document_bytes}")
        return self


class Dataset(Reading):
    """One component of a mixture: files of text, or a task that is already in SeqIO's registry.

    `source` says where the files are now and is no part of the dataset's identity: their names and contents are.
    A source is a path, a glob (`**` descends), a `file://` URL, or `package:` and a glob below this package's own texts.
    With `seqio_task` nothing is read here: that task's "train" split is trained on and its "validation" split, where it
    has one, is evaluated; `revision` then is the one thing that tells one state of its data from another.
    """

    name: str = Field(default=..., description="Names the component in weights, metrics and directories.")
    source: str | tuple[str, ...] = runtime((), description="Where the files are; see the class.")
    revision: str | None = Field(default=None, description="Which version of the data this is, in its publisher's words.")
    seqio_task: str | None = Field(default=None, description="A task in SeqIO's registry, by name.")
    seqio_module: str | None = Field(default=None, description="The module to import so that the task is in the registry.")

    @model_validator(mode="after")
    def _check_dataset(self) -> Dataset:
        check_name("dataset.name", self.name)
        if self.seqio_task is None:
            if not self.sources:
                raise ValueError(f"dataset {self.name!r} has no source; give a path or a glob, or the seqio_task to use")
            if self.seqio_module is not None:
                raise ValueError(f"dataset {self.name!r} has seqio_module={self.seqio_module!r} without seqio_task; name the task too")
        else:
            if self.sources:
                raise ValueError(f"dataset {self.name!r} has both source and seqio_task={self.seqio_task!r}; a task has its own source")
            if self.holdout:
                raise ValueError(f"dataset {self.name!r}: holdout={self.holdout} with seqio_task; the task's own validation split is used")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, one or many, as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def reading(self) -> Reading:
        """The part of the dataset that decides how its files become documents."""
        return Reading(**{name: getattr(self, name) for name in Reading.model_fields})


class SentencePieceTraining(Config):
    """A SentencePiece vocabulary trained on the mixture's own training documents, as a step of the run."""

    vocab_size: int = Field(default=2048, ge=300, le=1 << 20, description="Pieces, with the 3 special ones and the 256 bytes.")
    model_type: Literal["bpe", "unigram"] = Field(default="bpe", description="Llama tokenizers are bpe, and only those export to one.")
    character_coverage: float = Field(default=1.0, gt=0.9, le=1, description="Share of the characters that get a piece of their own.")
    byte_fallback: bool = Field(default=True, description="Spell other characters in bytes, so that no text is lost.")
    max_training_bytes: int = Field(default=64 << 20, ge=1, description="Train on at most so much text, from every dataset the same.")

    def size(self) -> int:
        """The number of ids."""
        return self.vocab_size


class SentencePieceFile(Config):
    """A SentencePiece model that exists. Its content is its identity; where it lies is not."""

    path: str = runtime(..., min_length=1, description="The `.model` file; it must define BOS and EOS.")

    def size(self) -> int:
        """The number of ids. Raises DataError where the file is no such model."""
        return inspect_vocabulary(self.path).vocab_size


Tokenizer = SentencePieceTraining | SentencePieceFile


class Mixture(Config):
    """Datasets, the share of the training tokens each gets, and the tokenizer they share.

    A dataset without a weight, or with weight 0, is only evaluated, on its held-out documents; so it must hold some out.
    """

    name: str = Field(default=..., description="Names the mixture and its vocabulary.")
    datasets: tuple[Dataset, ...] = Field(default=..., min_length=1, description="The components, in a fixed order.")
    weights: dict[str, float] = Field(default=..., description="Rates by dataset name, on any scale.")
    tokenizer: Tokenizer = Field(default=SentencePieceTraining(), description="Train a vocabulary, or use a file.")

    @model_validator(mode="after")
    def _check_mixture(self) -> Mixture:
        check_name("mixture.name", self.name)
        names = [dataset.name for dataset in self.datasets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mixture {self.name!r} has several datasets named {twice[0]!r}; names tell them apart, so rename one")
        if len({name.replace("-", "_") for name in names}) < len(names):
            raise ValueError(
                f"mixture {self.name!r}: SeqIO allows no '-', so two of the datasets {', '.join(names)} get one name; rename one"
            )
        for name, weight in self.weights.items():
            if name not in names:
                raise ValueError(
                    f"mixture.weights names {name!r}, which is no dataset of it{nearest(name, names)}; its datasets are {', '.join(names)}"
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"mixture.weights[{name!r}]={weight}: a weight is a finite number, 0 or more")
        registered = [dataset.name for dataset in self.datasets if dataset.seqio_task is not None]
        if registered and isinstance(self.tokenizer, SentencePieceTraining):
            raise ValueError(
                f"dataset {registered[0]!r} is a SeqIO task, which has its vocabulary already; "
                "set mixture.tokenizer to SentencePieceFile(path=...) of that vocabulary"
            )
        if not any(self.weights.values()):
            raise ValueError(f"mixture {self.name!r} has no weight above 0, so there is nothing to train on; give one in mixture.weights")
        for dataset in self.datasets:
            if not self.weight_of(dataset.name) and not dataset.holdout and dataset.seqio_task is None:
                raise ValueError(
                    f"dataset {dataset.name!r} has no weight and no holdout, so it would not be used at all; "
                    "give it a weight, or a holdout to evaluate it"
                )
        return self

    def weight_of(self, name: str) -> float:
        """The weight of a dataset; 0 where it is only evaluated."""
        return self.weights.get(name, 0.0)

    def identity(self) -> dict[str, Any]:
        """As of any configuration, with weights normalised: their scale changes nothing."""
        total = sum(self.weights.values())
        return {**super().identity(), "weights": {name: weight / total for name, weight in sorted(self.weights.items()) if weight}}


def check_name(field: str, name: str) -> None:
    """Raises ValueError unless `name` can name a directory on any system."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{field}={name[:80]!r}: it names a directory, so use 1 to 64 letters, digits, '.', '_' or '-', with no dot in front"
        )


def check_sources(mixture: Mixture) -> None:
    """Everything about the mixture's files that can be known to fail before work starts. Reads one byte of each.

    Raises DataError naming the dataset or the tokenizer, the file and the remedy: a source that matches nothing, a file
    that is empty or cannot be read, a tokenizer that is no SentencePiece model or lacks BOS or EOS.
    """
    for dataset in mixture.datasets:
        if dataset.seqio_task is None:
            files = find_files(dataset.name, dataset.sources)
            check_readable(dataset.name, files, allow_empty=dataset.on_bad_document == "skip")
    if isinstance(mixture.tokenizer, SentencePieceFile):
        inspect_vocabulary(mixture.tokenizer.path)


def shakespeare_mixture() -> Mixture:
    """The packaged default: thirteen plays and the sonnets, with a vocabulary of 2,048 pieces trained on them.

    BPE, because on this text it trains in 0.2 s and gives 2.97 bytes a token, where unigram takes 3.4 s for 3.00.
    """
    plays = Dataset(
        name="plays",
        source="package:shakespeare/plays/*.txt",
        document="paragraph",
        min_document_bytes=2000,
        holdout=0.05,
    )
    # a sonnet's number is a paragraph of its own: 500 bytes join it to its sonnet, and no sonnet to the next
    sonnets = Dataset(
        name="sonnets",
        source="package:shakespeare/sonnets/*.txt",
        document="paragraph",
        min_document_bytes=500,
        holdout=0.1,
    )
    return Mixture(name="shakespeare", datasets=(plays, sonnets), weights={"plays": 0.9, "sonnets": 0.1}, tokenizer=SentencePieceTraining())


def own_text_mixture(sources: tuple[str, ...], tokenizer: Tokenizer) -> Mixture:
    """A mixture of one dataset, `text`, over files of one's own: `.jsonl` by the key `text`, everything else as plain text.

    Plain text is cut at blank lines into documents of 2,000 bytes or more; a twentieth is held out.
    """
    if all(source.endswith(".jsonl") for source in sources):
        dataset = Dataset(name="text", source=sources, holdout=0.05, format="jsonl")
    else:
        dataset = Dataset(name="text", source=sources, holdout=0.05, document="paragraph", min_document_bytes=2000)
    return Mixture(name="text", datasets=(dataset,), weights={"text": 1.0}, tokenizer=tokenizer)
