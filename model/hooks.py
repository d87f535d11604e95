"""Everything periodic in a run: evaluation, samples, checkpoints. The training loop knows only `due` and `run`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from model.batches import EvalBatches
from model.child import emit
from model.distributed import is_leader
from model.evaluation import evaluate
from model.generate import generate
from model.metrics import read_json_lines
from model.partitioning import batch_sharding
from model.plots import write_loss_plots
from model.requests import Request
from model.train_step import make_eval_step
from model.vocabularies.vocabulary import Vocabulary

if TYPE_CHECKING:
    from model.trainer import Trainer


class Hook(Protocol):
    """Something done after certain steps."""

    def due(self, step: int) -> bool:
        """Whether to run after `step` steps."""
        ...

    def done(self, step: int) -> bool:
        """Whether the records have what it does after `step` steps: asked where a run goes on at that step."""
        ...

    def run(self, trainer: Trainer) -> None:
        """Does it. The metrics of all steps so far are logged by then."""
        ...


def make_hooks(trainer: Trainer) -> list[Hook]:
    """What a run does besides stepping, in this order: a checkpoint covers what the others did at its step."""
    train = trainer.job.train
    names = trainer.mixture.validation_names()
    rows = trainer.batch.eval_rows(train)  # every process reads whole batches; each device takes its rows
    # Cut off in rows: how many of them a device takes at once must not change what is scored.
    few = None if train.max_eval_batches is None else train.max_eval_batches * train.batch_schedule.largest
    held_out = [EvalBatches(trainer.mixture, name, seq_len=trainer.seq_len, batch_size=rows, max_rows=few) for name in names]
    return [
        *([EvaluateHook(held_out, trainer)] if held_out else []),
        *([SampleHook(trainer)] if train.sample_prompts else []),
        CheckpointHook(trainer),
        PlotHook(trainer),
    ]


class Periodic:
    """Due every so many steps, and after the last one."""

    def __init__(self, every: int, last_step: int) -> None:
        self._every, self._last_step = every, last_step

    def due(self, step: int) -> bool:
        """Whether `step` is a multiple of the period, or the end."""
        return step % self._every == 0 or step == self._last_step


class EvaluateHook(Periodic):
    """Held-out loss and bits per byte, for all components together and for each."""

    def __init__(self, components: list[EvalBatches], trainer: Trainer) -> None:
        super().__init__(trainer.job.train.steps_per_eval, trainer.last_step)
        self._components = components
        self._sums_of = make_eval_step(trainer.config, trainer.job.train, trainer.mesh)
        self._evaluated = {row["step"] for row in read_json_lines(trainer.records / "metrics.jsonl") if "eval/loss" in row}

    def done(self, step: int) -> bool:
        """Whether the curve has a held-out loss at `step`."""
        return step in self._evaluated

    def run(self, trainer: Trainer) -> None:
        """Logs `eval/...` at the current step."""
        began = time.perf_counter()
        sharding = batch_sharding(trainer.mesh)
        metrics = evaluate(self._sums_of, trainer.state.eval_params, self._components, sharding, tags=trainer.job.eval_tags)
        trainer.metrics.log(trainer.step, {**metrics, "eval/total_time": time.perf_counter() - began})
        emit("eval", step=trainer.step, metrics=metrics)


class SampleHook(Periodic):
    """Text from the model as it is now, the same prompts each time."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.job.train.steps_per_sample, trainer.last_step)
        self._sampled = {row["step"] for row in read_json_lines(trainer.records / "samples.jsonl")}
        self._vocabulary = Vocabulary.open(trainer.mixture.tokenizer.path)
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

    def done(self, step: int) -> bool:
        """Whether there are samples of `step`."""
        return step in self._sampled

    def run(self, trainer: Trainer) -> None:
        """Appends one line a prompt to `samples.jsonl`."""
        completions = generate(
            trainer.state.eval_params,
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
            trainer.samples.write(sample)
        emit("samples", step=trainer.step, samples=samples)


class CheckpointHook(Periodic):
    """Starts a save in the background; the metrics that it covers are forced to the disk first."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.job.train.steps_per_export, trainer.last_step)
        self._requests, self._checkpoints = trainer.requests, trainer.checkpoints

    def due(self, step: int) -> bool:
        """Whether its step has come, or somebody asked for it: the clock, a file, a signal."""
        return super().due(step) or self._requests.agreed >= Request.SAVE

    def done(self, step: int) -> bool:
        """Whether `step` is saved."""
        return self._checkpoints.latest_step() == step

    def run(self, trainer: Trainer) -> None:
        """Saves the state with the data position and what the data and the run are."""
        trainer.metrics.sync()
        trainer.samples.sync()
        trainer.checkpoints.save(trainer.step, trainer.state, trainer.progress(), trainer.curves())
        trainer.requests.served()
        emit("saving", step=trainer.step)


class PlotHook(CheckpointHook):
    """The loss as a picture, drawn anew with every checkpoint."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._path = trainer.records / "loss.png"

    def done(self, step: int) -> bool:
        """Whether there is one: the next checkpoint draws it anew."""
        return self._path.exists()

    def run(self, trainer: Trainer) -> None:
        """Writes `loss.png` and `loss.html`."""
        if is_leader():
            trainer.metrics.sync()
            write_loss_plots(trainer.records, title=trainer.job.name, unigram_entropy=trainer.mixture.unigram_entropy)
