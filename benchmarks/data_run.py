"""The data steps of a run, made here one after the other: the flow's own bodies and commits, without Prefect's server between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corpus import Corpus

DATASET_WEIGHTS = {"gcide": 0.4, "wordnet": 0.2, "kernel": 0.3, "shakespeare": 0.05, "wikipedia": 0.05, "packaged": 1.0}


def corpus_mixture(text: Corpus, tokenizer: Any, **fields: Any) -> Any:
    """The benchmark corpus as a Mixture, a dataset for each component."""
    from tasks.mixture_config import Dataset, Mixture

    datasets = tuple(
        Dataset(name=name, source=tuple(str(file) for file in files), format="jsonl", allow_links=True)
        for name, files in text.files.items()
    )
    weights = {name: DATASET_WEIGHTS[name] for name in text.files}
    return Mixture(name="corpus", datasets=datasets, weights=weights, tokenizer=tokenizer, **fields)


def make(mixture: Any, root: Path, kinds: tuple[str, ...] = ("raw", "tokenizers", "tokens")) -> dict[str, Path]:
    """Makes the steps of a mixture of these kinds, unless they are there; the directory of each as `kind/name`."""
    from tasks.artifacts import Artifact, commit, open_artifact
    from tasks.data_steps import mixture_steps
    from tasks.download import download_body
    from tasks.mixture import mix_body
    from tasks.pipeline import in_dependency_order
    from tasks.tokenization import tokenize_body
    from tasks.tokenize_config import TokenizeConfig
    from tasks.vocabulary import train_vocabulary_body

    bodies = {"raw": download_body, "tokenizers": train_vocabulary_body, "tokens": tokenize_body, "mixtures": mix_body}
    made: dict[str, Artifact] = {}
    for step in in_dependency_order((mixture_steps(mixture, TokenizeConfig()).mixture,)):
        if step.kind not in kinds:
            continue
        directory = step.directory(root)
        if step.is_committed(root):
            artifact = open_artifact(directory, step.fingerprint)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            output = bodies[step.kind](step, directory, tuple(made[upstream.fingerprint] for upstream in step.upstream))
            artifact = commit(directory, step, stats=dict(output))
        made[step.fingerprint] = artifact
    return {f"{artifact.kind}/{artifact.name}": Path(artifact.path) for artifact in made.values()}
