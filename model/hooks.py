"""Everything periodic in a run: evaluation, samples, checkpoints. The training loop knows only `due` and `run`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax

from model.batches import EvalBatches
from model.checkpoint import Checkpoints
from model.child import emit
from model.evaluation import evaluate
from model.generate import generate
from model.metrics import JsonLines
from model.partitioning import batch_sharding
from model.train_step import loss_sums
from model.vocabularies.vocabulary import Vocabulary

if TYPE_CHECKING:
    from model.trainer import Trainer


class Hook(Protocol):
    """Something done after certain steps."""

    def due(self, step: int, last_step: int) -> bool:
        """Whether to run after `step` steps of `last_step`."""
        ...

    def run(self, trainer: Trainer) -> None:
        """Does it. The metrics of all steps so far are logged by then."""
        ...


class Periodic:
    """Due every so many steps, and after the last one."""

    def __init__(self, every: int) -> None:
        self._every = every

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` is a multiple of the period, or the end."""
        return step % self._every == 0 or step == last_step


class EvaluateHook(Periodic):
    """Held-out loss and bits per byte, for all components together and for each."""

    def __init__(self, every: int, components: list[EvalBatches], max_batches: int | None, trainer: Trainer) -> None:
        super().__init__(every)
        self._components, self._max_batches = components, max_batches
        config, train, mesh = trainer.config, trainer.job.train, trainer.mesh
        self._sums_of = jax.jit(lambda params, batch: loss_sums(params, batch, config, train, mesh))

    def run(self, trainer: Trainer) -> None:
        """Logs `eval/...` at the current step."""
        began = time.perf_counter()
        sharding = batch_sharding(trainer.mesh)
        metrics = evaluate(self._sums_of, trainer.state.params, self._components, sharding, max_batches=self._max_batches)
        trainer.metrics.log(trainer.step, {**metrics, "eval/total_time": time.perf_counter() - began})
        emit("eval", step=trainer.step, metrics=metrics)


class SampleHook(Periodic):
    """Text from the model as it is now, the same prompts each time."""

    def __init__(self, every: int, lines: JsonLines, tokenizer_path: Path, trainer: Trainer) -> None:
        super().__init__(every)
        self._lines = lines
        self._vocabulary = Vocabulary.open(tokenizer_path)
        self._prompts = trainer.job.train.sample_prompts
        self._encoded = [self._encode(prompt) for prompt in self._prompts]
        room = trainer.config.seq_len - max((len(ids) for ids in self._encoded), default=0)
        if room < 1:  # known now, and not after hours of training
            raise ValueError(
                f"train.sample_prompts: the longest is {trainer.config.seq_len - room} tokens, which leaves no room to go on in "
                f"model.seq_len={trainer.config.seq_len}: shorten it"
            )
        self._max_new_tokens = min(trainer.job.train.sample_tokens, room)

    def _encode(self, prompt: str) -> list[int]:
        """As documents begin: with BOS where the vocabulary has one. A prompt without any token becomes EOS."""
        bos = [] if self._vocabulary.bos_id is None else [self._vocabulary.bos_id]
        return [*bos, *self._vocabulary.encode(prompt).tolist()] or [self._vocabulary.eos_id]

    def run(self, trainer: Trainer) -> None:
        """Appends one line a prompt to `samples.jsonl`."""
        if not self._prompts:
            return
        completions = generate(
            trainer.state.params,
            trainer.config,
            self._encoded,
            max_new_tokens=self._max_new_tokens,
            temperature=0.8,
            top_p=0.95,
            seed=trainer.step,
            eos_id=self._vocabulary.eos_id,
            num_ids=self._vocabulary.vocab_size,
        )
        samples: list[dict[str, Any]] = [
            {"step": trainer.step, "prompt": prompt, "text": self._vocabulary.decode(ids + new)}
            for prompt, ids, new in zip(self._prompts, self._encoded, completions, strict=True)
        ]
        for sample in samples:
            self._lines.write(sample)
        emit("samples", step=trainer.step, samples=samples)


class CheckpointHook(Periodic):
    """Starts a save in the background; the metrics that it covers are forced to the disk first."""

    def __init__(self, every: int, checkpoints: Checkpoints, lines: JsonLines) -> None:
        super().__init__(every)
        self._checkpoints, self._lines = checkpoints, lines

    def run(self, trainer: Trainer) -> None:
        """Saves the state with the data position and what the data and the run are."""
        trainer.metrics.sync()
        self._lines.sync()
        self._checkpoints.save(trainer.step, trainer.state, trainer.progress())
        emit("saving", step=trainer.step)
