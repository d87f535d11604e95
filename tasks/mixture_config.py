"""What a run is trained on: datasets and how they are read, rates, and what becomes of them by step. Plain configuration."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.config_base import Config, nearest, runtime
from tasks.vocabularies import SentencePieceTraining, Tokenizer, TokenizerTraining

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_TAG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_TFDS = "tfds://"
# A password, or a query that signs: https://user:password@host, ...?X-Amz-Signature=...; not ${NAME}, which stands for one.
_SECRET = re.compile(r"://[^/?#]*:(?!\$\{)[^/?#@]+@|[?&](?:[\w-]*[-_])?(?:signature|sig|token|secret|password|key)=(?!\$\{)", re.IGNORECASE)


class PromptCompletion(Config):
    """Records with a prompt and its completion; the loss counts on the completion (and the EOS after it) only."""

    kind: Literal["prompt_completion"] = "prompt_completion"
    prompt_key: str = Field(default="prompt", min_length=1, description="The key that holds the prompt.")
    completion_key: str = Field(default="completion", min_length=1, description="The key that holds the completion.")
    separator: str = Field(default="", description="Put between the two; part of the prompt.")


class Chat(Config):
    """Records with a list of messages `{"role": ..., "content": ...}`; the loss counts on the assistant's answers only.

    The template is Jinja as Hugging Face tokenizers have it, with `{% generation %}` ... `{% endgeneration %}` around what
    the model has to learn to say. It sees `messages`, `bos_token`, `eos_token` and `add_generation_prompt` (false).
    """

    kind: Literal["chat"] = "chat"
    messages_key: str = Field(default="messages", min_length=1, description="The key that holds the list of messages.")
    template: str | None = Field(default=None, description="Jinja source. Unset: `role: content` lines in plain text.")


class Reading(Config):
    """How documents are read out of a dataset's files, and which of them are held out."""

    format: Literal["auto", "txt", "jsonl", "json", "parquet"] = Field(
        default="auto",
        description="Text, one JSON object a line, JSON objects in a list or one after the other, parquet; auto: as the file's name ends.",
    )
    text_key: str = Field(default="text", min_length=1, description="The key, or parquet column, that holds the text; a.b descends.")
    answers: Annotated[PromptCompletion | Chat, Field(discriminator="kind")] | None = Field(
        default=None, description="Records with questions and answers: train on the answers only. Unset: train on the text of text_key."
    )
    document: Literal["file", "line", "paragraph"] = Field(
        default="file", description="What a document of a txt file is: the file, each line, or paragraphs (blocks between blank lines)."
    )
    min_document_bytes: int = Field(
        default=0, ge=0, description="Paragraphs are joined, with a blank line between, until they have so many bytes."
    )
    max_document_bytes: int = Field(default=16 << 20, ge=1, description="Longer documents are bad ones; none is ever read whole.")
    max_expansion: int = Field(
        default=200, ge=1, description="A compressed file that grows by more than this, beyond 64 MiB, is taken for a decompression bomb."
    )
    on_bad_document: Literal["fail", "skip"] = Field(
        default="fail", description="Stop at a document that is too long or undecodable or lacks its text, or skip and count it."
    )
    holdout: float = Field(
        default=0.0, ge=0, le=1, description="Share of the documents held out for validation, by a hash of the text; 1: only evaluated."
    )

    @model_validator(mode="after")
    def _check_reading(self) -> Reading:
        if self.min_document_bytes and (self.format not in ("auto", "txt") or self.document != "paragraph"):
            raise ValueError(f"min_document_bytes={self.min_document_bytes} joins paragraphs: set format='txt' and document='paragraph'")
        if self.min_document_bytes > self.max_document_bytes:
            raise ValueError(f"min_document_bytes={self.min_document_bytes} is above max_document_bytes={self.max_document_bytes}")
        if self.answers is not None and self.format == "txt":
            raise ValueError(f"answers={self.answers.kind} need records with keys, format='txt' has none: set format='jsonl' or 'parquet'")
        return self


class Dataset(Reading):
    """One component of a mixture: files of text, a TFDS dataset, or a task or mixture that is already in SeqIO's registry.

    `source` says where the files are now and is no part of the dataset's identity: their names and contents are.
    A source is a path or a glob (`**` descends), one of these URLs with globs, or several of them:
    `file://`, `http(s)://` (one file each), `hf://datasets/org/name@revision/glob`, `gs://` and whatever else fsspec opens,
    `LIST#GLOB` for a file that lists others by URL, `tfds://name/config:version`, or `package:` and a glob below this
    package's own texts. `${NAME}` in one stands for an environment variable, for what must not be kept.
    With `seqio_task` nothing is read here: that task's "train" split is trained on and its "validation" split, where it
    has one, is evaluated; `revision` then is the one thing that tells one state of its data from another. `seqio_mixture`
    stands for the tasks of a SeqIO mixture, which share this dataset's weight by the mixture's own rates.
    """

    name: str = Field(default=..., description="Names the component in weights, metrics and directories.")
    source: str | tuple[str, ...] = runtime((), description="Where the files are; see the class.")
    sha256: dict[str, str] = runtime({}, description="Published digests by file name, also of a list of files; what differs is refused.")
    revision: str | None = Field(default=None, description="Which version of the data this is, in its publisher's words.")
    licence: str | None = runtime(None, description="The licence of the data, for the record.")
    homepage: str | None = runtime(None, description="Where the data is described, for the record.")
    tags: tuple[str, ...] = runtime(
        (), description="Held-out numbers are also given over all datasets with a tag in common; `paloma/c4_en` has the tag `paloma` too."
    )
    source_bytes: int | None = runtime(None, ge=0, description="About how much there is to download, where that is known ahead.")
    allow_test_in_train: bool = runtime(False, description="Train on files although their names say test or validation.")
    allow_links: bool = runtime(False, description="Follow symbolic links that lead out of the source's directory.")
    seqio_task: str | None = Field(default=None, description="A task in SeqIO's registry, by name.")
    seqio_mixture: str | None = Field(default=None, description="A mixture in SeqIO's registry, by name.")
    seqio_module: str | None = Field(default=None, description="The module to import so that the task is in the registry.")

    @model_validator(mode="after")
    def _check_dataset(self) -> Dataset:
        check_name("dataset.name", self.name)
        named = self.seqio_task or self.seqio_mixture
        if self.seqio_task is not None and self.seqio_mixture is not None:
            raise ValueError(f"dataset {self.name!r} has both seqio_task and seqio_mixture; keep the one that is meant")
        if named is None:
            if not self.sources:
                raise ValueError(f"dataset {self.name!r} has no source; give a path or a glob, or the seqio_task to use")
            if self.seqio_module is not None:
                raise ValueError(f"dataset {self.name!r} has seqio_module={self.seqio_module!r} without seqio_task; name the task too")
        else:
            if self.sources:
                raise ValueError(f"dataset {self.name!r} has both source and seqio_task={named!r}; a task has its own source")
            if self.holdout:
                raise ValueError(f"dataset {self.name!r}: holdout={self.holdout} with seqio_task; the task's own validation split is used")
        for tag in self.tags:
            if not _TAG.fullmatch(tag):
                raise ValueError(
                    f"dataset {self.name!r} has the tag {tag!r}: it is part of a metric's name, so use letters, digits, '.', '_' or '-', "
                    "and '/' between levels"
                )
        for source in self.sources:
            if _SECRET.search(source):
                raise ValueError(
                    f"dataset {self.name!r} has a source with a password or a signature in it, which would be kept with the run's "
                    "parameters: put it into an environment variable and write ${NAME} in its place"
                )
        if self.tfds is not None and len(self.sources) > 1:
            raise ValueError(f"dataset {self.name!r} has several sources, one of them TFDS; make that a dataset of its own")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, one or many, as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def tfds(self) -> str | None:
        """The `name/config:version` of a TFDS source, or None."""
        return next((source.removeprefix(_TFDS) for source in self.sources if source.startswith(_TFDS)), None)

    @property
    def has_files(self) -> bool:
        """Whether files are read here, rather than through SeqIO."""
        return self.seqio_task is None and self.seqio_mixture is None and self.tfds is None

    @property
    def reading(self) -> Reading:
        """The part of the dataset that decides how its files become documents."""
        return Reading(**{name: getattr(self, name) for name in Reading.model_fields})


class WeightsFrom(Config):
    """Other rates from a train step on."""

    step: int = Field(default=..., ge=1, description="The first train step with these rates.")
    weights: dict[str, float] = Field(default=..., description="Rates by dataset name, on any scale.")


class SimulatedEpoching(Config):
    """Shows in a short run the repetition of a long one: each component is cut to the share experiment / target of its windows."""

    experiment_tokens: int = Field(default=..., ge=1, description="Tokens that this run trains on.")
    target_tokens: int = Field(default=..., ge=1, description="Tokens of the run that it stands for.")

    @model_validator(mode="after")
    def _check(self) -> SimulatedEpoching:
        if self.experiment_tokens > self.target_tokens:
            raise ValueError(
                f"simulated_epoching.experiment_tokens={self.experiment_tokens} is above target_tokens={self.target_tokens}: "
                "the experiment is the shorter run; swap them"
            )
        return self


class Mixture(Config):
    """Datasets, the share of the training tokens each gets, and the tokenizer they share.

    A dataset without a weight, or with weight 0, is only evaluated, on its held-out documents; so it must hold some out.
    """

    name: str = Field(default=..., description="Names the mixture and its vocabulary.")
    datasets: tuple[Dataset, ...] = Field(default=..., min_length=1, description="The components, in a fixed order.")
    weights: dict[str, float] = Field(default=..., description="Rates by dataset name, on any scale.")
    later_weights: tuple[WeightsFrom, ...] = Field(default=(), description="Other rates from later steps on, in the order of the steps.")
    tokenizer: Tokenizer = Field(default=SentencePieceTraining(), description="Train a vocabulary, or use a file.")
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="Rows are windows over the documents end to end, or whole documents packed by best fit (longer ones are cut).",
    )
    max_epochs: dict[str, float] = Field(
        default={}, description="By dataset: after so many epochs it is left out and the others take its share."
    )
    holdout_tail: dict[str, int] = Field(
        default={}, description="By dataset: about so many tokens at its end, in whole documents, are held out for validation."
    )
    simulated_epoching: SimulatedEpoching | None = Field(default=None, description="Repeat data as a longer run would.")

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
        for dataset in self.datasets:
            for other in sorted({tag.split("/")[0] for tag in dataset.tags} & {*names} - {dataset.name}):
                raise ValueError(
                    f"dataset {dataset.name!r} has the tag {other!r}, which is the name of another dataset, so their numbers would have "
                    "one name; rename one of them"
                )
        stages = [("weights", self.weights), *((f"later_weights[{stage.step}]", stage.weights) for stage in self.later_weights)]
        for field, weights in stages:
            _check_weights(self.name, field, weights, names)
        steps = [stage.step for stage in self.later_weights]
        if steps != sorted(set(steps)):
            raise ValueError(f"mixture.later_weights start at the steps {steps}: they must rise from stage to stage")
        for field, limits in (("max_epochs", self.max_epochs), ("holdout_tail", self.holdout_tail)):
            for name, limit in limits.items():
                _check_named(f"mixture.{field}", name, names)
                if not (math.isfinite(limit) and limit > 0):
                    raise ValueError(f"mixture.{field}[{name!r}]={limit}: it must be above 0, or be left out")
        registered = [dataset.name for dataset in self.datasets if dataset.seqio_task or dataset.seqio_mixture]
        if registered and isinstance(self.tokenizer, TokenizerTraining):
            raise ValueError(
                f"dataset {registered[0]!r} is a SeqIO task, which has its vocabulary already; "
                "set mixture.tokenizer to SentencePieceFile(path=...) of that vocabulary"
            )
        for dataset in self.datasets:
            if self.is_trained(dataset.name) and dataset.holdout == 1:
                raise ValueError(f"dataset {dataset.name!r} has a weight and holdout=1.0, which leaves no training text; drop one of them")
            held_out = dataset.holdout or dataset.name in self.holdout_tail
            if not self.is_trained(dataset.name) and not held_out and dataset.has_files:
                raise ValueError(
                    f"dataset {dataset.name!r} has no weight and no holdout, so it would not be used at all; "
                    "give it a weight, or a holdout to evaluate it"
                )
        return self

    def weight_of(self, name: str) -> float:
        """The weight of a dataset at the start; 0 where it is only evaluated, or trained on later."""
        return self.weights.get(name, 0.0)

    def is_trained(self, name: str) -> bool:
        """Whether any stage trains on the dataset."""
        return any(weights.get(name, 0.0) > 0 for weights in (self.weights, *(stage.weights for stage in self.later_weights)))

    def shares(self) -> tuple[dict[str, Any], ...]:
        """The stages as `{"step": first step, "shares": {dataset: share}}`; shares add up to 1, their scale changes nothing."""
        return tuple(
            {"step": step, "shares": {name: weight / sum(weights.values()) for name, weight in sorted(weights.items()) if weight}}
            for step, weights in ((0, self.weights), *((stage.step, stage.weights) for stage in self.later_weights))
        )


def _check_weights(mixture: str, field: str, weights: dict[str, float], names: list[str]) -> None:
    for name, weight in weights.items():
        _check_named(f"mixture.{field}", name, names)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"mixture.{field}[{name!r}]={weight}: a weight is a finite number, 0 or more")
    if not any(weights.values()):
        raise ValueError(f"mixture {mixture!r} has no weight above 0, so there is nothing to train on; give one in mixture.{field}")


def _check_named(field: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise ValueError(f"{field} names {name!r}, which is no dataset of it{nearest(name, names)}; its datasets are {', '.join(names)}")


def check_name(field: str, name: str) -> None:
    """Raises ValueError unless `name` can name a directory on any system."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{field}={name[:80]!r}: it names a directory, so use 1 to 64 letters, digits, '.', '_' or '-', with no dot in front"
        )
