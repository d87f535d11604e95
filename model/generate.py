"""Text generation with a key/value cache, a whole batch of prompts at once; as it is made, or at the end.

    generate(params, config, [[1, 450, 2]], max_new_tokens=64, temperature=0.8, top_p=0.95, seed=0, eos_id=2)

Prompts are padded on the left, so that every row writes its next token to the same cache slot; padding has a segment id
of its own and is never attended to.

Shape suffixes: B prompts, P padded prompt length, T cache slots (P + new tokens), N new tokens, L layers, H query heads,
G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from model.attention import attention, masked_attention
from model.attention_backend import attention_window
from model.config import LlamaConfig
from model.linear import Precision
from model.llama import decoder_layer, embed_tokens, final_norm, unembed
from model.parameters import Params
from model.partitioning import constrain
from model.rope import rope_tables

# Prompts are padded to a multiple of this, so that prompts of similar length share one compilation.
PROMPT_MULTIPLE = 32

Cache = tuple[jax.Array, jax.Array]  # keys and values, each [L, B, G, T, K]


class _Settings(NamedTuple):
    """What the compiled function is specialised to."""

    config: LlamaConfig
    max_new_tokens: int
    greedy: bool
    num_ids: int | None
    compute_dtype: DTypeLike
    mesh: Mesh | None


class _State(NamedTuple):
    step: jax.Array  # tokens generated so far
    output_BN: jax.Array
    done_B: jax.Array
    logits_BV: jax.Array  # for the next token
    cache: Cache


class _Sampling(NamedTuple):
    """What may change from call to call without another compilation."""

    temperature: jax.Array | np.float32
    top_p: jax.Array | np.float32
    seed: jax.Array | np.uint32
    eos_id: jax.Array | np.int32  # -1: none


def generate(
    params: Params,
    config: LlamaConfig,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int,
    eos_id: int | None = None,
    num_ids: int | None = None,
    compute_dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """The tokens that continue each prompt, without the prompt; an `eos_id`, once sampled, is the last of its row.

    A row depends on its own prompt, its index, `seed` and the settings, not on the other prompts (but for rounding).

    Args:
        params: on any mesh, or numpy; on several hosts, every process calls with the same arguments.
        prompts: at least one id each, normally beginning with BOS.
        max_new_tokens: longest continuation.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: sample from the smallest set of tokens that holds this probability (Holtzman et al. 2020); 1 is all.
        seed: of the sampling; the same seed gives the same tokens.
        eos_id: stop a row here; None never stops early.
        num_ids: never give an id from here up: the model's vocabulary may be larger than the tokenizer's. None: all of it are ids.
        compute_dtype: dtype of the layers and the cache.

    Raises:
        ValueError: an argument is out of range, or a prompt leaves no room within `config.seq_len`.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for block in stream(
        params,
        config,
        prompts,
        block=max_new_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_id=eos_id,
        num_ids=num_ids,
        compute_dtype=compute_dtype,
    ):
        for row, tokens in zip(rows, block, strict=True):
            row += tokens
    return rows


def stream(
    params: Params,
    config: LlamaConfig,
    prompts: list[list[int]],
    *,
    block: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int,
    eos_id: int | None = None,
    num_ids: int | None = None,
    compute_dtype: DTypeLike = jnp.float32,
) -> Iterator[list[list[int]]]:
    """The tokens of `generate` as they are made: after every `block` steps the new ones of each row, until all rows have ended.

    The same programs run whatever `block` is, so the tokens do not depend on it. Arguments and errors are those of `generate`.
    """
    _check_settings(config, max_new_tokens, temperature, top_p, seed)
    _check_prompts(config, prompts, max_new_tokens)
    if block < 1:
        raise ValueError(f"block={block}: ask for at least one token at a time")
    if not prompts:
        return iter(())
    longest = max(map(len, prompts))
    padded_length = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    padding_B = np.array([padded_length - len(prompt) for prompt in prompts], np.int32)
    prompts_BP = np.zeros((len(prompts), padded_length), np.int32)
    for row, prompt in enumerate(prompts):
        prompts_BP[row, padding_B[row] :] = prompt
    free = config.model_copy(update={"attn_backend": "auto"})  # one forced for training may not take the length of a prompt
    settings = _Settings(free, max_new_tokens, temperature == 0, num_ids, compute_dtype, _mesh_of(params))
    stop = np.int32(-1 if eos_id is None else eos_id)
    sampling = _Sampling(np.float32(temperature), np.float32(top_p), np.uint32(seed), stop)
    return _blocks(settings, params, prompts_BP, padding_B, sampling, block)


def _blocks(
    settings: _Settings, params: Params, prompts_BP: np.ndarray, padding_B: np.ndarray, sampling: _Sampling, block: int
) -> Iterator[list[list[int]]]:
    state = _start(settings, params, prompts_BP, padding_B)
    made, done_B = 0, np.zeros(len(padding_B), bool)
    while made < settings.max_new_tokens and not done_B.all():
        state = _advance(settings, params, state, np.int32(made + block), padding_B, sampling)
        steps, now_done_B, output_BN = int(state.step), np.asarray(state.done_B), np.asarray(state.output_BN)
        rows = output_BN[:, made:steps].tolist()
        yield [[] if was else _up_to(row, int(sampling.eos_id)) for row, was in zip(rows, done_B.tolist(), strict=True)]
        made, done_B = steps, now_done_B


@functools.partial(jax.jit, static_argnums=(0,))
def _start(settings: _Settings, params: Params, prompts_BP: jax.Array, padding_B: jax.Array) -> _State:
    """The state before the first new token: the prompts are in the cache, which has room for all that may come."""
    batch = prompts_BP.shape[0]
    logits_BV, cache = _prefill(settings, params, prompts_BP, padding_B)
    output_BN = jnp.zeros((batch, settings.max_new_tokens), jnp.int32)
    return _State(jnp.zeros((), jnp.int32), output_BN, jnp.zeros(batch, bool), logits_BV, cache)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _advance(settings: _Settings, params: Params, state: _State, last_step: jax.Array, padding_B: jax.Array, sampling: _Sampling) -> _State:
    """The state after `last_step` new tokens, or where every row has ended; what follows a row's end has no meaning."""
    rows = jnp.arange(state.done_B.shape[0])
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(rows)
    prompt_length = state.cache[0].shape[3] - settings.max_new_tokens

    def unfinished(state: _State) -> jax.Array:
        return (state.step < jnp.minimum(last_step, settings.max_new_tokens)) & ~state.done_B.all()

    def next_token(state: _State) -> _State:
        if settings.greedy:
            tokens_B = jnp.argmax(state.logits_BV, axis=-1)
        else:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.step)
            tokens_B = jax.vmap(_sample, (0, 0, None, None))(step_keys, state.logits_BV, sampling.temperature, sampling.top_p)
        tokens_B = tokens_B.astype(jnp.int32)
        output_BN = state.output_BN.at[:, state.step].set(tokens_B)
        logits_BV, cache = _decode(settings, params, tokens_B, prompt_length + state.step, padding_B, state.cache)
        return _State(state.step + 1, output_BN, state.done_B | (tokens_B == sampling.eos_id), logits_BV, cache)

    state = jax.lax.while_loop(unfinished, next_token, state)
    # every process reads these whole
    return state._replace(
        output_BN=constrain(state.output_BN, (None, None), settings.mesh), done_B=constrain(state.done_B, (None,), settings.mesh)
    )


def _prefill(settings: _Settings, params: Params, prompts_BP: jax.Array, padding_B: jax.Array) -> tuple[jax.Array, Cache]:
    """Runs the prompts through the layers: logits [B, V] after their last token, and the cache with room for new ones."""
    config = settings.config
    positions_BP = jnp.arange(prompts_BP.shape[1]) - padding_B[:, None]
    segment_ids_BP = (positions_BP >= 0).astype(jnp.int32)
    rope = rope_tables(positions_BP, config)

    def attend(q_BHPK: jax.Array, k_BGPK: jax.Array, v_BGPK: jax.Array) -> tuple[jax.Array, Cache]:
        return attention(q_BHPK, k_BGPK, v_BGPK, segment_ids_BP, config), (k_BGPK, v_BGPK)

    def layer_step(x_BPD: jax.Array, layer: Params) -> tuple[jax.Array, Cache]:
        return decoder_layer(x_BPD, layer, rope, attend, config, Precision(settings.compute_dtype))

    x_BPD, cache = jax.lax.scan(layer_step, embed_tokens(params, prompts_BP, config, settings.compute_dtype), params["layers"])
    room = [(0, 0), (0, 0), (0, 0), (0, settings.max_new_tokens), (0, 0)]
    keys_LBGTK, values_LBGTK = (jnp.pad(part, room) for part in cache)
    return _last_logits(settings, params, x_BPD[:, -1:]), (keys_LBGTK, values_LBGTK)


def _decode(
    settings: _Settings, params: Params, tokens_B: jax.Array, slot: jax.Array, padding_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs one token a row, written to cache position `slot`: logits [B, V] after it, and the grown cache."""
    config = settings.config
    rope = rope_tables((slot - padding_B)[:, None], config)
    slots = jnp.arange(cache[0].shape[3])
    seen_BT = (slots >= padding_B[:, None]) & (slots <= slot)
    if (window := attention_window(config, len(slots))) is not None:
        seen_BT &= slots > slot - window  # a row's padding moves all of its tokens alike, so slots are as far apart as positions
    mask_BST = seen_BT[:, None]

    def layer_step(x_B1D: jax.Array, layer_and_cache: tuple[Params, Cache]) -> tuple[jax.Array, Cache]:
        layer, (keys_BGTK, values_BGTK) = layer_and_cache

        def attend(q_BH1K: jax.Array, k_BG1K: jax.Array, v_BG1K: jax.Array) -> tuple[jax.Array, Cache]:
            keys = jax.lax.dynamic_update_slice_in_dim(keys_BGTK, k_BG1K, slot, axis=2)
            values = jax.lax.dynamic_update_slice_in_dim(values_BGTK, v_BG1K, slot, axis=2)
            return masked_attention(q_BH1K, keys, values, mask_BST), (keys, values)

        return decoder_layer(x_B1D, layer, rope, attend, config, Precision(settings.compute_dtype))

    x_B1D = embed_tokens(params, tokens_B[:, None], config, settings.compute_dtype)
    x_B1D, cache = jax.lax.scan(layer_step, x_B1D, (params["layers"], cache))
    return _last_logits(settings, params, x_B1D), cache


def _last_logits(settings: _Settings, params: Params, x_B1D: jax.Array) -> jax.Array:
    logits_BV = unembed(params, final_norm(params, x_B1D, settings.config), settings.config)[:, 0]
    if settings.num_ids is None:
        return logits_BV
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < settings.num_ids, logits_BV, -jnp.inf)


def _sample(key: jax.Array, logits_V: jax.Array, temperature: jax.Array | np.float32, top_p: jax.Array | np.float32) -> jax.Array:
    """One token from the nucleus of softmax(logits / temperature); the likeliest token is always in it."""
    order_V = jnp.argsort(-logits_V)
    sorted_V = logits_V[order_V] / temperature
    probabilities_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(probabilities_V) - probabilities_V
    return order_V[jax.random.categorical(key, jnp.where((before_V < top_p) | (top_p >= 1), sorted_V, -jnp.inf))]


def _check_settings(config: LlamaConfig, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: ask for at least one")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: use 0 for the likeliest token, or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: use a probability in (0, 1]")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: use a number in [0, 2**32)")


def _check_prompts(config: LlamaConfig, prompts: list[list[int]], max_new_tokens: int) -> None:
    vocab_size = config.vocab_size
    if vocab_size is None:
        raise ValueError("model.vocab_size is unset: set it, or take it from the tokenizer with config.with_vocab(size)")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{index}] is empty: begin it with the BOS id")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompts[{index}] has an id outside [0, {vocab_size}): encode it with the model's own tokenizer")
        if len(prompt) + max_new_tokens > config.seq_len:
            raise ValueError(
                f"prompts[{index}] of {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed model.seq_len={config.seq_len}: "
                f"shorten one of them"
            )


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh that the parameters live on, if any: the tokens must come back whole to every process."""
    mesh = getattr(getattr(params["embed"], "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def _up_to(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id) + 1] if eos_id in row else row
