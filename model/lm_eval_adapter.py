"""One of our models as lm-eval's language model: it asks in text, we answer with log-likelihoods or text.

Tokens, windows and truncation are those of lm-eval's own Hugging Face backend (0.4.13), given the same model as an export, so that
the numbers compare with what others publish: BOS before each context; a context that is too long loses its beginning; a long text
is scored in windows that each see one token of the one before. That backend also scores a BOS after BOS where it scores whole texts,
which no model is trained for; `score_bos=False` leaves it out. Text that looks like a special token is text here, and a special
token there.

Shape suffixes: B rows, S tokens in a row, D hidden width, C tokens of a row at once, N = S / C, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from model.config import LlamaConfig
from model.feed import place
from model.generate import stream
from model.llama import hidden_states, unembed
from model.parameters import Params
from model.partitioning import batch_sharding
from model.trained_model import TrainedModel

SHORTEST_ROW = 32  # rows are padded to a power of two from here up, so that few shapes are compiled
LOGITS_CHUNK = 128  # tokens of each row whose logits exist at once
STOP_BLOCK = 16  # generated tokens between two looks for a stop sequence
KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}  # what changes nothing may be said

Request = tuple[Any, list[int], list[int]]  # a key, the context's ids, the continuation's


class LmEvalModel(TemplateLM):
    """A TrainedModel behind lm-eval's interface."""

    def __init__(
        self, model: TrainedModel, *, batch_size: int, score_bos: bool = True, tell: Callable[..., object] = lambda **_: None
    ) -> None:
        """`batch_size`: rows at once, rounded up to what the devices divide; `score_bos`: see the module.

        `tell` is called after each batch, with `what` ("likelihoods" or "texts"), and how many requests are `done` of the `total`.
        """
        super().__init__()
        self._model, self._score_bos, self._tell = model, score_bos, tell
        self._sharding = batch_sharding(model.mesh)
        devices = model.mesh.devices.size
        self._rows = -(-batch_size // devices) * devices
        self.max_length = model.config.seq_len
        self.max_gen_toks = min(256, model.config.seq_len // 2)

    @property
    def eot_token_id(self) -> int:
        """EOS, which ends documents."""
        return self._model.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context comes after: BOS or, where there is none, EOS."""
        bos = self._model.vocabulary.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, BOS first unless `add_special_tokens` is False or there is none."""
        if add_special_tokens is False:
            return self._model.vocabulary.encode(string).tolist()
        return self._model.prompt_ids(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each text as a whole, each token predicted once."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=None if self._score_bos else False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        """For each request the log-likelihood of its continuation in nats, and whether each of its tokens is the likeliest.

        Raises:
            ValueError: a continuation is empty, or longer than the model's context.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: the model's context is {self.max_length} tokens, and "
                    "it must have one at least; change the task"
                )
            by_length[self._padded(min(len(context) + len(continuation) - 1, self.max_length))].append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for length in sorted(by_length, reverse=True):  # what needs most memory first
            for some in _chunks(by_length[length], self._rows):
                batch = _scored_rows([requests[index] for index in some], self._rows, length)
                model = self._model
                nats_B, greedy_B = _score(model.config, model.mesh, model.params, place(batch, self._sharding))
                for index, nats, greedy in zip(some, np.asarray(nats_B).tolist(), np.asarray(greedy_B).tolist(), strict=False):
                    answers[index] = nats, greedy
                done += len(some)
                self._tell(what="likelihoods", done=done, total=len(requests))
        return answers

    def _padded(self, length: int) -> int:
        return min(max(SHORTEST_ROW, 1 << (length - 1).bit_length()), self.max_length)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to the first stop sequence.

        Raises:
            ValueError: a task wants to sample in a way that is not there, or more tokens than the context has.
        """
        by_settings: dict[str, list[int]] = defaultdict(list)
        asked: list[tuple[str, dict[str, Any]]] = [tuple(request.args) for request in requests]  # pyright: ignore[reportAssignmentType]
        for index, (_, given) in enumerate(asked):
            by_settings[repr(sorted(given.items()))].append(index)
        texts = [""] * len(requests)
        done = 0
        for indices in by_settings.values():
            settings: dict[str, Any] = dict(normalize_gen_kwargs(asked[indices[0]][1], self.max_gen_toks))
            most = int(settings["max_gen_toks"])
            if most >= self.max_length:
                raise ValueError(f"a task asks for max_gen_toks={most} of a model whose context is {self.max_length} tokens: lower it")
            prompts = {index: self.tok_encode(asked[index][0])[most - self.max_length :] for index in indices}
            chunks = _chunks(sorted(indices, key=lambda index: -len(prompts[index])), self._rows)
            for seed, some in enumerate(chunks):  # a task may ask the same several times, for several samples
                for index, text in zip(some, self._continue([prompts[index] for index in some], settings, seed), strict=True):
                    texts[index] = text
                done += len(some)
                self._tell(what="texts", done=done, total=len(requests))
        return texts

    def _continue(self, prompts: list[list[int]], settings: dict[str, Any], seed: int) -> list[str]:
        sampling = bool(settings["do_sample"])
        unknown = {name: value for name, value in settings.items() if name not in KNOWN_SETTINGS and value != NEUTRAL.get(name)}
        if unknown:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
            raise ValueError(f"a task asks for {listed}: only temperature and top_p are there; change the task")
        if settings["max_gen_toks"] == 0:
            return [""] * len(prompts)
        temperature = float(settings.get("temperature", 0.0))
        if sampling and temperature == 0.0:
            raise ValueError(
                "a task samples (do_sample: true) without a temperature above 0: set one, or do_sample: false; change the task"
            )
        model, rows = self._model, [list[int]() for _ in prompts]
        until = [stop for stop in settings["until"] if stop]
        texts = [""] * len(prompts)
        blocks = stream(
            model.params,
            model.config,
            prompts,
            block=STOP_BLOCK,
            max_new_tokens=settings["max_gen_toks"],
            temperature=temperature if sampling else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            seed=seed,
            eos_id=self.eot_token_id,
            num_ids=model.vocabulary.vocab_size,
        )
        for block in blocks:
            for row, ids in zip(rows, block, strict=True):
                row += ids
            texts = [model.vocabulary.decode(row) for row in rows]
            if all(self.eot_token_id in row or any(stop in text for stop in until) for row, text in zip(rows, texts, strict=True)):
                break
        return [postprocess_generated_text(text, until, None) for text in texts]


def _chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _scored_rows(requests: Sequence[Request], num_rows: int, length: int) -> dict[str, np.ndarray]:
    """Inputs, targets and weights [B, S]: the weight is 1 on the continuation; rows past the requests have none."""
    batch = {name: np.zeros((num_rows, length), np.int32) for name in ("tokens", "targets", "weights")}
    for row, (_, context, continuation) in enumerate(requests):
        ids = (context + continuation)[-(length + 1) :]
        batch["tokens"][row, : len(ids) - 1] = ids[:-1]
        batch["targets"][row, : len(ids) - 1] = ids[1:]
        batch["weights"][row, len(ids) - 1 - len(continuation) : len(ids) - 1] = 1
    return batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(config: LlamaConfig, mesh: Mesh, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Sum of the targets' log-probabilities in nats, float32 [B], and whether each target is the likeliest, bool [B]; by weight."""
    x_BSD = hidden_states(params, batch["tokens"], config, mesh=mesh)
    chunk = math.gcd(x_BSD.shape[1], LOGITS_CHUNK)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)  # [B, S, ...] as [N, B, C, ...]

    def score(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC, weights_BC = part
        logits_BCV = unembed(params, x_BCD, config)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], -1)[..., 0]
        nats_BC = target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        greedy_BC = (jnp.argmax(logits_BCV, axis=-1) == targets_BC) | (weights_BC == 0)
        return (nats_BC * weights_BC).sum(-1), greedy_BC.all(-1)

    nats_NB, greedy_NB = jax.lax.map(score, (split(x_BSD), split(batch["targets"]), split(batch["weights"])))
    return nats_NB.sum(0), greedy_NB.all(0)
