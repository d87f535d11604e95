"""Optimizers, the decay mask and update clipping against their definitions, in numpy and float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import partitioning
from model.config import LlamaConfig
from model.optimizer import DECAYED, clip_by_matrix_rms, decay_mask, decayed_names, make_optimizer
from model.parameters import init_params, param_shapes
from model.sophia import sampled_targets
from model.train_config import SimpleTrainConfig
from model.train_step import first_state, state_shardings

CONFIG = LlamaConfig(hidden_dim=8, intermediate_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, vocab_size=16)
HIDDEN = DECAYED - {"head"}
NUM_TARGETS = 7.0
Tree = Any
Definition = Callable[[int, Tree, dict[str, Tree]], Tree]  # step from 1, gradients, memory -> updates before decay and learning rate


def train_config(**changes: object) -> SimpleTrainConfig:
    fixed = {"train_batch_size": 4, "num_train_steps": 100, "learning_rate": 1e-2, "warmup": 0, "lr_schedule": "constant"}
    return SimpleTrainConfig(**{**fixed, **changes})


@functools.cache
def first_params() -> Tree:
    return jax.tree.map(np.asarray, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0)))


def gradient(step: int, params: Tree) -> Tree:
    return jax.tree.map(lambda x: np.sin(step * 37.0 * np.asarray(x) + step), params)


def sampled_gradient(params: Tree) -> tuple[Tree, Any]:
    return jax.tree.map(lambda x: 0.1 * jnp.cos(31.0 * x), params), NUM_TARGETS


def run(train: SimpleTrainConfig, steps: int) -> tuple[Tree, list[Tree]]:
    """The weights after some steps of the optimizer, and the gradients that it got."""
    optimizer, params = make_optimizer(train), first_params()
    state, history = optimizer.init(params), []

    @functools.partial(jax.jit)
    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        return optimizer.update(grads, state, params, step=step, sampled_gradient=functools.partial(sampled_gradient, params))

    for step in range(1, steps + 1):
        history.append(gradient(step, params))
        updates, state = update(history[-1], state, params, step - 1)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
    return params, history


def kept(memory: dict[str, Tree], name: str, like: Tree) -> Tree:
    return memory.setdefault(name, jax.tree.map(np.zeros_like, like))


def average(memory: dict[str, Tree], name: str, beta: float, values: Tree) -> Tree:
    memory[name] = jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, kept(memory, name, values), values)
    return memory[name]


def adam(step: int, grads: Tree, memory: dict[str, Tree], *, nesterov: bool = False) -> Tree:
    first, second = average(memory, "first", 0.9, grads), average(memory, "second", 0.95, jax.tree.map(np.square, grads))
    if nesterov:
        ahead = jax.tree.map(lambda m, g: 0.9 * m / (1 - 0.9 ** (step + 1)) + 0.1 * g / (1 - 0.9**step), first, grads)
    else:
        ahead = jax.tree.map(lambda m: m / (1 - 0.9**step), first)
    return jax.tree.map(lambda m, v: m / (np.sqrt(v / (1 - 0.95**step)) + 1e-8), ahead, second)


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Jordan's quintic iteration on one matrix."""
    x = x / np.linalg.norm(x)
    flipped = x.shape[0] > x.shape[1]
    x = x.T if flipped else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if flipped else x


def muon(step: int, grads: Tree, memory: dict[str, Tree]) -> Tree:
    momentum = average(memory, "momentum", 0.95, grads)

    def update(path: Any, m: np.ndarray, g: np.ndarray, by_adam: np.ndarray) -> np.ndarray:
        if path[-1].key not in HIDDEN:
            return by_adam
        ahead = 0.95 * m / (1 - 0.95 ** (step + 1)) + 0.05 * g / (1 - 0.95**step)
        return np.stack([0.2 * math.sqrt(max(layer.shape)) * orthogonal(layer) for layer in ahead])

    return jax.tree_util.tree_map_with_path(update, momentum, grads, adam(step, grads, memory))


def lion(step: int, grads: Tree, memory: dict[str, Tree]) -> Tree:
    updates = jax.tree.map(lambda m, g: np.sign(0.9 * m + 0.1 * g), kept(memory, "m", grads), grads)
    average(memory, "m", 0.99, grads)
    return updates


def adafactor(step: int, grads: Tree, memory: dict[str, Tree]) -> Tree:
    decay = 1 - step**-0.8
    squares = jax.tree.map(lambda g: g * g + 1e-30, grads)

    def scaled(path: Any, g: np.ndarray, v: np.ndarray) -> np.ndarray:
        if min(v.shape[-2:]) >= 8 and path[-1].key not in ("norm", "attn_norm", "mlp_norm"):
            rows, columns = v.mean(-1, keepdims=True), v.mean(-2, keepdims=True)
            v = rows * columns / rows.mean(-2, keepdims=True)
        update = g / np.sqrt(v)
        axes = tuple(range(1 if path[0].key == "layers" else 0, update.ndim))
        return update / np.maximum(1.0, np.sqrt((update**2).mean(axes, keepdims=True)))

    return jax.tree_util.tree_map_with_path(scaled, grads, average(memory, "v", decay, squares))


def sophia(step: int, grads: Tree, memory: dict[str, Tree]) -> Tree:
    """Curvature every second step, from the weights before it; it is used from the next step on."""
    first = average(memory, "first", 0.965, grads)
    updates = jax.tree.map(
        lambda m, h: np.clip(m / (1 - 0.965**step) / np.maximum(0.05 * h, 1e-12), -1, 1), first, kept(memory, "h", grads)
    )
    if step % 2:
        average(memory, "h", 0.99, jax.tree.map(lambda x: NUM_TARGETS * (0.1 * np.cos(31.0 * x)) ** 2, memory["params"]))
    return updates


CASES: dict[str, tuple[dict[str, Any], Definition]] = {
    "adamw": ({}, adam),
    "nesterov": ({"nesterov": True}, functools.partial(adam, nesterov=True)),
    "muon": ({"optimizer": "muon"}, muon),
    "lion": ({"optimizer": "lion"}, lion),
    "adafactor": ({"optimizer": "adafactor", "adafactor": {"min_dim_size_to_factor": 8}}, adafactor),
    "sophia": ({"optimizer": "sophia", "sophia": {"update_interval": 2}}, sophia),
}


@pytest.mark.parametrize("name", CASES)
def test_optimizer_against_its_definition(name: str) -> None:
    """Five steps of clip, the optimizer, decoupled decay and the learning rate, given the same gradients."""
    changes, definition = CASES[name]
    final, history = run(train_config(weight_decay=0.3, max_grad_norm=0.5, **changes), steps=5)
    expected, memory = jax.tree.map(np.float64, first_params()), {}
    for step, grads in enumerate(history, 1):
        memory["params"] = expected
        norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
        assert norm > 0.5, "clipped"
        updates = definition(step, jax.tree.map(lambda g, n=norm: np.float64(g) * 0.5 / n, grads), memory)
        expected = jax.tree.map(lambda p, u, d: p - 1e-2 * (u + 0.3 * p * d), expected, updates, decay_mask(expected))
    moved = jax.tree.map(lambda e, p: np.abs(e - p).max(), expected, first_params())
    assert min(jax.tree.leaves(moved)) > 5e-3
    jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, rtol=3e-5, atol=3e-6), final, expected)


def test_muon_learning_rates_and_width_scaling() -> None:
    """Without consistent_rms the factor is sqrt(max(1, out / in)); the ratio is of Adam's weights alone, decay included."""
    usual, _ = run(train_config(optimizer="muon", weight_decay=0.3), steps=1)
    other, _ = run(train_config(optimizer="muon", weight_decay=0.3, muon={"consistent_rms": None, "adam_learning_rate_ratio": 0.5}), 1)
    decayed, before = train_config().learning_rate * 0.3, first_params()
    for name in ("embed", "norm", "head"):
        np.testing.assert_allclose(other[name] - before[name], 0.5 * (usual[name] - before[name]), atol=1e-7)
    factors = {"w_gate": math.sqrt(2) / 0.8, "w_down": 1 / 0.8, "wq": 1 / (0.2 * math.sqrt(8)), "wk": 1 / (0.2 * math.sqrt(8))}
    for name, factor in factors.items():  # w_gate goes from 8 to 16, stored [16, 8]; w_down the other way
        was = before["layers"][name] * (1 - decayed)
        np.testing.assert_allclose(other["layers"][name] - was, factor * (usual["layers"][name] - was), atol=2e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_decay_is_for_linear_weights_only(tied: bool) -> None:
    config = CONFIG.model_copy(update={"tie_word_embeddings": tied})
    shapes = param_shapes(config)
    names = {name.split("/")[-1] for name in decayed_names(shapes)}
    assert names == DECAYED - ({"head"} if tied else set())
    mask = decay_mask(shapes)
    assert not mask["embed"]
    assert not mask["norm"]
    assert not mask["layers"]["attn_norm"]
    assert not mask["layers"]["mlp_norm"]


def test_update_rms_is_clipped_layer_by_layer() -> None:
    """By hand: the layers of one array have root mean squares 5 and 0.5; only the first is above 1."""
    updates = {"norm": jnp.array([3.0, 4.0]), "layers": {"wq": jnp.array([[[3.0, 4.0], [5.0, 50**0.5]], [[0.5, 0.5], [0.5, 0.5]]])}}
    clipped = clip_by_matrix_rms(1.0).update(updates, optax.EmptyState())[0]
    np.testing.assert_allclose(clipped["norm"], np.array([3.0, 4.0]) / 12.5**0.5, rtol=1e-6)
    np.testing.assert_allclose(clipped["layers"]["wq"][0], np.array([[0.6, 0.8], [1.0, 2**0.5]]), rtol=1e-6)
    np.testing.assert_array_equal(clipped["layers"]["wq"][1], updates["layers"]["wq"][1])


def test_decay_comes_before_update_clipping() -> None:
    """With huge decay the clipped update is a decay alone, of root mean square 0.1 times the learning rate."""
    final, _ = run(train_config(weight_decay=1e6, update_rms_clipping=0.1), steps=1)
    change = final["head"] - first_params()["head"]
    assert float(np.sqrt(np.mean(change**2))) == pytest.approx(1e-3, rel=1e-4)
    np.testing.assert_allclose(np.sign(change), -np.sign(first_params()["head"]))


@pytest.mark.parametrize("name", [*CASES, "averages"])
def test_the_same_update_on_eight_devices(name: str) -> None:
    """What is as large as a weight is split as the weight is, all else is replicated."""
    changes = {"ema_beta": 0.9, "skip_bad_steps": True, "clip_update_norm": True} if name == "averages" else CASES[name][0]
    train, mesh = train_config(**changes), partitioning.make_mesh(data=2, tensor=2)
    placed, shapes = state_shardings(CONFIG, train, mesh), param_shapes(CONFIG)
    state, results = jax.device_put(first_state(train, first_params()), placed), []
    weights = {(leaf.shape, sharding) for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed.params), strict=True)}
    large = {shape for shape, _ in weights if math.prod(shape) > 16}  # a mean over a matrix's rows can be as small as a norm
    leaves = list(zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True))
    assert all((leaf.shape, sharding) in weights for leaf, sharding in leaves if leaf.shape in large)
    assert all(sharding.is_fully_replicated for leaf, sharding in leaves if leaf.shape not in large)

    def updated(shardings: Tree, params: Tree, opt_state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        optimizer = make_optimizer(train, shardings)
        return optimizer.update(grads, opt_state, params, step=3, sampled_gradient=functools.partial(sampled_gradient, params))

    grads = gradient(1, jax.device_get(state.params))
    for shardings in (placed, jax.tree.map(lambda _: jax.devices()[0], placed)):
        arguments = jax.device_put((state.params, state.opt_state, grads), (shardings.params, shardings.opt_state, shardings.params))
        where, out = (placed.params, (placed.params, placed.opt_state)) if shardings is placed else (None, None)
        update = jax.jit(functools.partial(updated, where), out_shardings=out)
        results.append(jax.device_get(update(*arguments)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), *results)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_sophia_draws_the_same_targets_on_any_mesh(soft_cap: float | None) -> None:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(4, 16, 8)).astype(np.float32), rng.normal(size=(8, 24)).astype(np.float32)
    seeds = rng.integers(0, 2**32, (4, 16), dtype=np.uint32)

    def draw(mesh: Any) -> np.ndarray:
        drawn = functools.partial(sampled_targets, vocab_size=20, logit_soft_cap=soft_cap, mesh=mesh)
        return np.asarray(jax.jit(drawn)(hidden, head, seeds))

    noise = np.stack([jax.random.gumbel(jax.random.key(seed), (24,)) for seed in seeds.reshape(-1)]).reshape(4, 16, 24)
    logits = hidden @ head
    logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
    for mesh in (None, partitioning.make_mesh(context=4), partitioning.make_mesh(data=2, context=2, tensor=2)):
        np.testing.assert_array_equal(draw(mesh), (logits + noise)[..., :20].argmax(-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": "adam"},
            r"train.optimizer='adam' is unknown \(did you mean 'adamw'\?\): use one of adamw, muon, lion, adafactor, sophia",
        ),
        ({"optimizer": "lion", "beta2": 0.99}, r"train.beta2=0.99 has no effect with train.optimizer='lion'.*train.lion is where"),
        ({"nesterov": True, "optimizer": "adafactor"}, r"train.nesterov=True has no effect with train.optimizer='adafactor'"),
        ({"muon": {"ns_steps": 4}}, r"train.muon=.*ns_steps=4.* has no effect with train.optimizer='adamw'.*use train.optimizer='muon'"),
        ({"bad_step_window": {"sigma": 5}}, r"train.bad_step_window=.* has no effect without train.skip_bad_steps"),
        ({"clip_update_norm": True, "update_norm_window": {"sigma": 3, "length": 32}}, r"min_entries=64 is more than length=32"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_config(**changes)


@pytest.mark.oracle
def test_fifty_steps_of_adamw_are_those_of_torch() -> None:
    """Warmup, cosine, clipping and the decay mask included; in torch, decayed and other weights are two groups."""
    torch = pytest.importorskip("torch")
    train = train_config(num_train_steps=50, warmup=10, lr_schedule="cosine", weight_decay=0.3, max_grad_norm=0.5)
    final, history = run(train, steps=50)
    weights = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), first_params())
    leaves, decayed = jax.tree.leaves(weights), jax.tree.leaves(decay_mask(first_params()))
    groups = [
        {"params": [leaf for leaf, is_decayed in zip(leaves, decayed, strict=True) if is_decayed is wanted], "weight_decay": decay}
        for wanted, decay in ((True, 0.3), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step, grads in enumerate(history):
        rate = step / 10 if step < 10 else 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 40)) + 0.1
        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = torch.tensor(np.asarray(grad))
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        optimizer.step()
    jax.tree.map(lambda x, weight: np.testing.assert_allclose(x, weight.detach().numpy(), rtol=2e-5, atol=2e-6), final, weights)
