"""The mixture step: names the token stores and their shares, and measures what guessing by frequency alone would cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.durable import remove_temporaries, write_json
from model.mixture_store import MIXTURE_FILE
from model.token_split import TokenSplit, with_tail
from model.token_store import TokenStore
from model.vocabularies.vocabulary import Vocabulary
from tasks.artifacts import Artifact
from tasks.caching import run_logger, step_task
from tasks.children import ChildFailed, run_child
from tasks.data_steps import Mixing, RawFiles, RegisteredTask, TfdsTask, Tokenization
from tasks.download import raw_files
from tasks.seqio_bridge.mixture_worker import MixtureComponentSpec, MixtureSpec
from tasks.sources import DataError
from tasks.steps import Step


def mix_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Writes `mixture.json` over `inputs`: the tokenizer, a token store for each dataset, the raw files of those that have any.

    It names its neighbours by relative paths, so that a root can be moved as a whole.
    Raises DataError where a store was made with another tokenizer, or a dataset with a share has no training token.
    """
    config = step.config
    assert isinstance(config, Mixing)
    tokenizer, *others = inputs
    vocabulary = Vocabulary.open(Path(tokenizer.path))
    rates = seqio_rates(step, directory, inputs)
    # the first stage as SeqIO has it; SeqIO knows no rates that change
    stages = [{"step": 0, "shares": rates}, *config.stages[1:]]
    trained = {name for stage in stages for name, share in stage["shares"].items() if share}
    components: list[dict[str, Any]] = []
    frequencies = np.zeros(vocabulary.vocab_size)
    for artifact in (artifact for artifact in others if artifact.kind == "tokens"):
        component, counts = _component(artifact, directory, vocabulary, config)
        if artifact.name in trained and not component["splits"]["train"]["tokens"]:
            raise DataError(f"dataset {artifact.name!r} has no training token; add text, or lower its holdout")
        frequencies += rates.get(artifact.name, 0.0) * counts / max(counts.sum(), 1)
        components.append(component)
    value = {
        "name": step.name,
        "components": components,
        "stages": stages,
        "packing": config.packing,
        "simulated_epoching": config.simulated_epoching.identity() if config.simulated_epoching else None,
        "tokenizer": {
            "path": os.path.relpath(tokenizer.path, directory),
            "digest": vocabulary.digest,
            "vocab_size": vocabulary.vocab_size,
            "bos_id": vocabulary.bos_id,
            "eos_id": vocabulary.eos_id,
        },
        "unigram_entropy": unigram_entropy(frequencies),
    }
    remove_temporaries(directory)
    write_json(directory / MIXTURE_FILE, value)
    totals = {name: sum(part["splits"]["train"][name] for part in components) for name in ("documents", "tokens", "source_bytes")}
    return {"unigram_entropy": value["unigram_entropy"], "components": len(components), **totals}


def _component(artifact: Artifact, directory: Path, vocabulary: Vocabulary, config: Mixing) -> tuple[dict[str, Any], np.ndarray]:
    """The entry of one token store in `mixture.json`, and how often each id occurs in its training split [vocab_size]."""
    store = TokenStore.open(artifact)
    if store.tokenizer_digest != vocabulary.digest:
        raise DataError(f"{artifact.path} was made with another tokenizer than {vocabulary.digest[:16]}; tokenize it again")
    tail = config.holdout_tail.get(artifact.name, 0)
    splits = with_tail(store.splits, tail, artifact.path)
    train = splits.get("train")
    counts = train.counts(vocabulary.vocab_size) if train else np.zeros(vocabulary.vocab_size, np.int64)
    if vocabulary.bos_id is not None:
        # never a target that counts, so no part of what frequency alone would cost
        counts[vocabulary.bos_id] = 0
    entry = {
        "name": artifact.name,
        "store": os.path.relpath(artifact.path, directory),
        "fingerprint": artifact.fingerprint,
        "splits": {split: _totals(splits.get(split)) for split in ("train", "validation")},
        "unigram_entropy": unigram_entropy(counts),
        "tail_tokens": tail,
        "max_epochs": config.max_epochs.get(artifact.name),
    }
    return entry, counts


def seqio_rates(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, float]:
    """Defines the mixture as a real `seqio.Mixture`, in a child process; the rates SeqIO has for it, by dataset.

    Raises DataError where a token store does not begin with the documents that SeqIO yields.
    """
    config = step.config
    assert isinstance(config, Mixing)
    paths = {artifact.fingerprint: artifact.path for artifact in inputs}
    components: list[MixtureComponentSpec] = []
    for tokens in (upstream for upstream in step.upstream if upstream.kind == "tokens"):
        store = str(Path(paths[tokens.fingerprint]).absolute())
        if isinstance(tokens.config, RegisteredTask):
            components.append(MixtureComponentSpec(name=tokens.name, store=store, registered=tokens.config))
        elif isinstance(tokens.config, TfdsTask):
            components.append(MixtureComponentSpec(name=tokens.name, store=store, tfds=tokens.config))
        else:
            raw = tokens.upstream[0]
            assert isinstance(tokens.config, Tokenization)
            assert isinstance(raw.config, RawFiles)
            files = tuple(map(str, raw_files(Path(paths[raw.fingerprint]).absolute(), raw.config)))
            components.append(MixtureComponentSpec(name=tokens.name, store=store, files=files, reading=tokens.config.reading))
    tokenizer = str(Path(inputs[0].path).absolute())
    spec = MixtureSpec(name=step.name, tokenizer=tokenizer, weights=config.stages[0]["shares"], components=tuple(components))
    path = directory / ".mixture.json"
    write_json(path, spec.model_dump(mode="json"))
    rates: dict[str, float] = {}

    def on_event(event: dict[str, Any]) -> None:
        rates.update(event.get("rates", {}))
        if event.get("event") == "warning":
            run_logger().warning(str(event["message"]))

    try:
        run_child("tasks.seqio_bridge.mixture_worker", [str(path.absolute())], on_event)
    except ChildFailed as failed:
        raise DataError(str(failed)) from None
    return rates


def unigram_entropy(counts: np.ndarray) -> float:
    """The entropy in nats of ids drawn by their frequency: the loss of a model that knows nothing but how common each is.

    Shannon, "A mathematical theory of communication", 1948. `counts` [vocab_size] may be on any scale; 0 where all are 0.
    """
    total = counts.sum()
    if not total:
        return 0.0
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())


def _totals(stream: TokenSplit | None) -> Mapping[str, int]:
    return {
        "documents": stream.num_documents if stream else 0,
        "tokens": stream.num_tokens if stream else 0,
        "source_bytes": stream.source_bytes if stream else 0,
    }


mix = step_task(description="Name the token stores of a mixture and their shares")(mix_body)
