"""Generation with the cache against `forward` run afresh for every token; sampling, stopping, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.generate
from model.config import LlamaConfig
from model.generate import generate, stream
from model.llama import forward, init_params
from model.partitioning import make_mesh, param_shardings

CONFIG = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=50)
PROMPTS = [[1, 7, 9], [1], [1, 3, 5, 7, 11, 13, 17, 19, 23, 29]]


@pytest.fixture(scope="module")
def params() -> dict:
    # The initial embedding is so small that all logits are nearly equal; larger weights make choices clear.
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, init_params(CONFIG, jax.random.key(0)))


def greedy_by_forward(params: dict, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    logits_of = jax.jit(forward, static_argnums=2)
    for _ in range(count):
        # Zeros on the right keep one shape; no token sees what comes after it.
        padded = jnp.array([tokens + [0] * (24 - len(tokens))])
        tokens.append(int(jnp.argmax(logits_of(params, padded, CONFIG)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_with_the_cache_equals_forward_from_scratch(params: dict) -> None:
    generated = generate(params, CONFIG, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0)
    assert generated == [greedy_by_forward(params, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in generated}) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_same_tokens_in_blocks(params: dict, temperature: float) -> None:
    settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    whole = generate(params, CONFIG, PROMPTS, **settings)
    eos_id = whole[1][4]
    for stop in (None, eos_id):
        expected = generate(params, CONFIG, PROMPTS, **settings, eos_id=stop)
        for block in (1, 5, 100):
            blocks = list(stream(params, CONFIG, PROMPTS, **settings, block=block, eos_id=stop))
            assert [[token for part in blocks for token in part[row]] for row in range(3)] == expected
            assert max(len(row) for part in blocks for row in part) <= block
            assert len(blocks) == -(-max(map(len, expected)) // block)
    with pytest.raises(ValueError, match="block=0"):
        stream(params, CONFIG, PROMPTS, **settings, block=0)


def test_padding_of_the_vocabulary_is_never_drawn(params: dict) -> None:
    padded = CONFIG.model_copy(update={"pad_vocab_to_multiple_of": 64})
    likely = {
        **params,
        "head": jnp.pad(params["head"], ((0, 0), (0, 14)), constant_values=100.0),
        "embed": jnp.pad(params["embed"], ((0, 14), (0, 0))),
    }
    drawn = {
        temperature: generate(likely, padded, PROMPTS, max_new_tokens=12, temperature=temperature, seed=0) for temperature in (0.0, 1.0)
    }
    assert drawn[0.0] == generate(params, CONFIG, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0)
    assert all(token < 50 for row in drawn[1.0] for token in row)


@pytest.mark.slow
def test_parameters_on_a_mesh_and_on_the_host_generate_the_same(params: dict) -> None:
    expected = generate(params, CONFIG, PROMPTS, max_new_tokens=5, temperature=0.0, seed=0)
    mesh = make_mesh(tensor=2)
    assert (
        generate(jax.device_put(params, param_shardings(CONFIG, mesh)), CONFIG, PROMPTS, max_new_tokens=5, temperature=0.0, seed=0)
        == expected
    )
    assert generate(jax.tree.map(np.asarray, params), CONFIG, PROMPTS, max_new_tokens=5, temperature=0.0, seed=0) == expected


def test_rows_end_with_the_first_eos(params: dict) -> None:
    free = generate(params, CONFIG, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0)
    eos_id = free[0][4]
    stopped = generate(params, CONFIG, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0, eos_id=eos_id)
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(eos_id) + 1] if eos_id in full else full)
    assert len(stopped[0]) <= 5


def test_the_seed_decides_the_sample(params: dict) -> None:
    def sample(seed: int) -> list[list[int]]:
        return generate(params, CONFIG, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed)

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    same_prompt = generate(params, CONFIG, [[1, 7], [1, 7]], max_new_tokens=12, temperature=1.0, seed=3)
    assert same_prompt[0] != same_prompt[1], "rows must not share their random numbers"


def test_every_step_draws_anew(params: dict) -> None:
    indifferent = jax.tree.map(jnp.zeros_like, params)
    for row in generate(indifferent, CONFIG, PROMPTS, max_new_tokens=12, temperature=1.0, seed=3):
        assert len(set(row)) > 6, "twelve draws from fifty equally likely tokens"


def test_a_row_does_not_depend_on_the_other_prompts(params: dict) -> None:
    together = generate(params, CONFIG, PROMPTS, max_new_tokens=8, temperature=0.7, seed=5)
    assert generate(params, CONFIG, PROMPTS[:1], max_new_tokens=8, temperature=0.7, seed=5) == together[:1]


@pytest.mark.slow
def test_samples_follow_the_distribution(params: dict) -> None:
    logits = forward(params, jnp.array([[1, 7]]), CONFIG)[0, -1] / 1.5
    rows = generate(params, CONFIG, [[1, 7]] * 1000, max_new_tokens=1, temperature=1.5, seed=0)
    observed = np.bincount([row[0] for row in rows], minlength=50) / 1000
    np.testing.assert_allclose(observed, jax.nn.softmax(logits), atol=0.06)


def test_top_p_samples_from_the_nucleus_only(params: dict) -> None:
    probabilities = np.asarray(jax.nn.softmax(forward(params, jnp.array([[1, 7]]), CONFIG)[0, -1] / 2.0))
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), 0.5)) + 1
    assert 1 < size < 50
    rows = generate(params, CONFIG, [[1, 7]] * 1000, max_new_tokens=1, temperature=2.0, top_p=0.5, seed=1)
    assert {row[0] for row in rows} == set(order[:size].tolist())
    tiny = generate(params, CONFIG, [[1, 7]] * 1000, max_new_tokens=1, temperature=2.0, top_p=1e-6, seed=1)
    assert tiny == [[int(order[0])]] * 1000


def test_prompts_of_similar_length_share_one_compilation(params: dict) -> None:
    generate(params, CONFIG, [[1, 2]], max_new_tokens=3, temperature=0.5, seed=0)
    before = model.generate._advance._cache_size()
    generate(params, CONFIG, [[1, 2, 3, 4]], max_new_tokens=3, temperature=0.9, top_p=0.5, seed=9, eos_id=4)
    assert model.generate._advance._cache_size() == before


def test_no_prompts_no_work(params: dict) -> None:
    assert generate(params, CONFIG, [], max_new_tokens=3, temperature=0.0, seed=0) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1, 50]]}, r"prompts\[0\] has an id outside \[0, 50\)"),
        ({"prompts": [[-1]]}, "outside"),
        ({"prompts": [[1] * 60]}, "exceed model.seq_len=64"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(params: dict, change: dict, message: str) -> None:
    arguments = {"prompts": [[1]], "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        generate(params, CONFIG, **arguments)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_rows_beyond_the_tokenizer_are_never_given(params: dict, temperature: float) -> None:
    # Made the likeliest by far: a padded vocabulary's rows are as the optimizer leaves them.
    padded = {**params, "head": params["head"].at[:, 40:].multiply(50.0)}
    free = generate(padded, CONFIG, PROMPTS, max_new_tokens=12, temperature=temperature, seed=0)
    held = generate(padded, CONFIG, PROMPTS, max_new_tokens=12, temperature=temperature, seed=0, num_ids=40)
    assert any(token >= 40 for row in free for token in row)
    assert all(token < 40 for row in held for token in row)


@pytest.mark.parametrize("backend", ["flash", "plain"])
def test_a_backend_forced_for_training_does_not_decide_over_prompts(params: dict, backend: str) -> None:
    forced = CONFIG.model_copy(update={"attn_backend": backend})
    generated = generate(params, forced, PROMPTS, max_new_tokens=4, temperature=0.0, seed=0)
    assert generated == [greedy_by_forward(params, prompt, 4) for prompt in PROMPTS]
