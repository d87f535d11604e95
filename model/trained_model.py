"""A trained model from wherever it lies, with its tokenizer, to be used: by completion and by the evaluation harness.

    model = TrainedModel.open("artifacts/checkpoints/debug-2b2e...")          # the newest checkpoint of a run
    model = TrainedModel.open("artifacts/checkpoints/debug-2b2e.../checkpoints/400")
    model = TrainedModel.open("artifacts/checkpoints/debug-2b2e.../hf")       # or any Llama of Hugging Face's

A checkpoint says itself what model it is and which mixture it was trained on, so a run directory can be moved. Its tokenizer is
that of the mixture: where the run's `.job.json` says it is, or in `mixtures/` beside the run's `checkpoints/`; where neither is
there any more, that of the run's export in `hf/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from model import partitioning
from model.checkpoint import read_progress, restore_params
from model.config import LlamaConfig
from model.hf import load_hf
from model.mixture_store import MixtureTokenizer
from model.model_place import find_model, is_hf
from model.parameters import Params, param_shapes
from model.token_store import StoreError
from model.vocabularies.vocabulary import FILES, Vocabulary

JOB_FILE = ".job.json"


@dataclass(frozen=True)
class TrainedModel:
    """Weights on the devices of `mesh`, what they are the weights of, and the tokenizer they were trained with."""

    path: Path
    config: LlamaConfig
    params: Params
    vocabulary: Vocabulary
    mesh: Mesh

    @classmethod
    def open(cls, path: Path | str) -> TrainedModel:
        """Opens a run directory, one of its `checkpoints/<step>`, or a Hugging Face directory; the weights are verified.

        Raises:
            ValueError: there is no model, it is damaged, or its tokenizer is not to be found; with the remedy.
        """
        place = find_model(path)
        return cls._of_hf(place) if is_hf(place) else cls._of_checkpoint(place)

    @classmethod
    def _of_hf(cls, directory: Path) -> TrainedModel:
        config, arrays = load_hf(directory)
        mesh = partitioning.make_mesh()
        params = jax.device_put(arrays, partitioning.param_shardings(config, mesh))
        return cls(directory, config, params, hf_vocabulary(directory), mesh)

    @classmethod
    def _of_checkpoint(cls, directory: Path) -> TrainedModel:
        progress = read_progress(directory)
        vocabulary = _vocabulary_of_run(directory.parent.parent, progress["data"]["mixture"])
        config = LlamaConfig.model_validate(progress["config"]["model"]).with_vocab(vocabulary.vocab_size)
        mesh = partitioning.make_mesh()
        abstract = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            param_shapes(config),
            partitioning.param_shardings(config, mesh),
        )
        averaged = progress["config"]["train"].get("ema_beta") is not None  # then those are what is evaluated and exported
        params = restore_params(directory, abstract, field="ema_params" if averaged else "params")
        return cls(directory, config, params, vocabulary, mesh)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text as documents begin: BOS first, where the tokenizer has one."""
        bos = [] if self.vocabulary.bos_id is None else [self.vocabulary.bos_id]
        return [*bos, *self.vocabulary.encode(text).tolist()]


def hf_vocabulary(directory: Path) -> Vocabulary:
    """The tokenizer in a Hugging Face directory. Raises ValueError where there is none that is known."""
    for name in (FILES["huggingface"], FILES["sentencepiece"], FILES["tiktoken"]):
        if (directory / name).is_file():
            return Vocabulary.open(directory / name)
    raise ValueError(f"{directory} has no tokenizer that is known: put its {', '.join(FILES.values())} (one of them) there")


def _vocabulary_of_run(run: Path, fingerprint: str) -> Vocabulary:
    """The tokenizer of the mixture that a run was trained on, or of the run's export."""
    why: list[str] = []
    for place in _mixture_places(run, fingerprint):
        try:
            tokenizer = MixtureTokenizer.of_mixture(place, fingerprint)
            tokenizer.check()
            return Vocabulary.open(tokenizer.path)
        except StoreError as error:
            why.append(str(error))
    if is_hf(run / "hf"):
        return hf_vocabulary(run / "hf")
    raise ValueError(
        f"the tokenizer of {run} is not to be found ({'; '.join(why) or 'its mixture is not there'}): put the mixture "
        f"{fingerprint[:16]} into {run.parent.parent / 'mixtures'}, with the tokenizer that it names beside it, or use an export of the run"
    )


def _mixture_places(run: Path, fingerprint: str) -> list[Path]:
    """Where the mixture of a run may be: where it was when the run was trained, or in the root that the run is in."""
    job = run / JOB_FILE
    recorded = [Path(json.loads(job.read_text(encoding="utf-8"))["mixture"])] if job.is_file() else []
    return [*recorded, *sorted((run.parent.parent / "mixtures").glob(f"*-{fingerprint[:16]}"))]
