"""The mixture step: names the token stores and their shares, and measures what guessing by frequency alone would cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.durable import remove_temporaries, write_json
from model.mixture_store import MIXTURE_FILE
from model.token_store import TokenStore
from tasks.artifacts import Artifact
from tasks.caching import step_task
from tasks.children import ChildFailed, run_child
from tasks.data_steps import Mixing, RawFiles, RegisteredTask, Tokenization
from tasks.download import raw_files
from tasks.mixture_worker import MixtureComponentSpec, MixtureSpec
from tasks.sources import DataError
from tasks.steps import Step
from tasks.vocabulary import MODEL
from tasks.vocabulary_file import inspect_vocabulary


def mix_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Writes `mixture.json` over `inputs`: the tokenizer, a token store for each dataset, the raw files of those that have any.

    It names its neighbours by relative paths, so that a root can be moved as a whole.
    Raises DataError where a store was made with another tokenizer, or a dataset with a weight has no training token.
    """
    tokenizer, *others = inputs
    tokens = [artifact for artifact in others if artifact.kind == "tokens"]
    model = Path(tokenizer.path) / MODEL
    weights = seqio_rates(step, directory, inputs)
    info = inspect_vocabulary(model)
    components: list[dict[str, Any]] = []
    frequencies = np.zeros(info.vocab_size)
    for artifact in tokens:
        store = TokenStore.open(artifact)
        weight = weights.get(artifact.name, 0.0)
        if store.tokenizer_sha256 != info.sha256:
            raise DataError(f"{artifact.path} was made with another tokenizer than {model}; tokenize it again")
        train = store.splits.get("train")
        if weight and (train is None or not train.num_tokens):
            raise DataError(f"dataset {artifact.name!r} has no training token; add text, or lower its holdout")
        counts = train.counts(info.vocab_size) if train else np.zeros(info.vocab_size, np.int64)
        # never a target that counts, so no part of what frequency alone would cost
        counts[info.bos_id] = 0
        if weight:
            frequencies += weight * counts / counts.sum()
        components.append(
            {
                "name": artifact.name,
                "weight": weight,
                "store": os.path.relpath(artifact.path, directory),
                "fingerprint": artifact.fingerprint,
                "splits": {split: _totals(store, split) for split in ("train", "validation")},
                "unigram_entropy": unigram_entropy(counts),
            }
        )
    value = {
        "name": step.name,
        "components": components,
        "tokenizer": {
            "path": os.path.relpath(model, directory),
            "sha256": info.sha256,
            "vocab_size": info.vocab_size,
            "bos_id": info.bos_id,
            "eos_id": info.eos_id,
        },
        "unigram_entropy": unigram_entropy(frequencies),
    }
    remove_temporaries(directory)
    write_json(directory / MIXTURE_FILE, value)
    totals = {name: sum(part["splits"]["train"][name] for part in components) for name in ("documents", "tokens", "source_bytes")}
    return {"unigram_entropy": value["unigram_entropy"], "components": len(components), **totals}


def seqio_rates(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, float]:
    """Defines the mixture as a real `seqio.Mixture`, in a child process; the rates SeqIO has for it, by dataset.

    Raises DataError where a token store does not begin with the document that SeqIO yields.
    """
    config = step.config
    assert isinstance(config, Mixing)
    paths = {artifact.fingerprint: artifact.path for artifact in inputs}
    components: list[MixtureComponentSpec] = []
    for tokens in (upstream for upstream in step.upstream if upstream.kind == "tokens"):
        store = str(Path(paths[tokens.fingerprint]).absolute())
        if isinstance(tokens.config, RegisteredTask):
            components.append(MixtureComponentSpec(name=tokens.name, store=store, registered=tokens.config))
            continue
        raw = tokens.upstream[0]
        assert isinstance(tokens.config, Tokenization)
        assert isinstance(raw.config, RawFiles)
        files = raw_files(Path(paths[raw.fingerprint]).absolute(), raw.config)
        components.append(MixtureComponentSpec(name=tokens.name, store=store, files=tuple(map(str, files)), reading=tokens.config.reading))
    tokenizer = str((Path(inputs[0].path) / MODEL).absolute())
    spec = MixtureSpec(name=step.name, tokenizer=tokenizer, weights=config.weights, components=tuple(components))
    path = directory / ".mixture.json"
    write_json(path, spec.model_dump(mode="json"))
    rates: dict[str, float] = {}
    try:
        run_child("tasks.mixture_worker", [str(path.absolute())], lambda event: rates.update(event.get("rates", {})))
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


def _totals(store: TokenStore, split: str) -> Mapping[str, int]:
    stream = store.splits.get(split)
    return {
        "documents": stream.num_documents if stream else 0,
        "tokens": stream.num_tokens if stream else 0,
        "source_bytes": stream.source_bytes if stream else 0,
    }


mix = step_task(description="Name the token stores of a mixture and their shares")(mix_body)
