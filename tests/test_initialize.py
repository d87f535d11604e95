"""Runs that start from weights made elsewhere: what is taken, what begins fresh, where the data goes on, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import partitioning
from model.checkpoint import Checkpoints, named_leaves
from model.config import LlamaConfig, RopeConfig
from model.hf import load_hf, save_hf
from model.hf_tokenizer import HfTokenizer
from model.hf_weights import StoredTensors
from model.initialize import initialize
from model.jumps import Jump
from model.train_config import SimpleTrainConfig
from model.train_step import init_state
from tasks.datasets import SentencePieceTraining
from tasks.initial_weights import pin_initial_weights
from tasks.vocabulary import train_sentencepiece
from tests.training_processes import finish, losses, make_mixture, start, write_job

BATCH, STEP = 8, 5
DATA = {"order_version": 1, "mixture": "m" * 64, "tokenizer": "t" * 64, "seed": 0, "seq_len": 32}


def model(**changes: Any) -> LlamaConfig:
    shape = {"seq_len": 32, "hidden_dim": 32, "intermediate_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 60}
    return LlamaConfig(**{**shape, **changes})


def train(**changes: Any) -> SimpleTrainConfig:
    return SimpleTrainConfig(**{"train_batch_size": BATCH, "num_train_steps": 10, "learning_rate": 1e-2, **changes})


@functools.cache
def mesh() -> Any:
    return partitioning.make_mesh(devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The state of another run after five steps, which none of these runs would have made from its own seed."""
    state = init_state(model(), train(seed=7), mesh())
    state = jax.tree.map(lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x, state)._replace(step=jnp.int32(STEP))
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


@pytest.fixture(scope="module")
def saved(theirs: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(directory / "checkpoints", keep_every=10)
    state = jax.tree.unflatten(jax.tree.structure(init_state(model(), train(), mesh())), theirs.values())
    placed = jax.device_put(state, jax.tree.map(lambda x: x.sharding, init_state(model(), train(), mesh())))
    checkpoints.save(STEP, placed, {"step": STEP, "data": {**DATA, "next_row": 44}, "jumps": [], "config": {"model": model().identity()}})
    checkpoints.close()
    return directory


def begin(config: LlamaConfig, settings: SimpleTrainConfig, *, tokenizer: Path = Path("unread"), data: dict[str, Any] | None = None) -> Any:
    return initialize(config, settings, mesh(), loader_state={**DATA, **(data or {})}, tokenizer=tokenizer)


def begun(saved: Path, *, of: LlamaConfig | None = None, data: dict[str, Any] | None = None, **changes: Any) -> tuple[dict[str, Any], Any]:
    made = begin(of or model(), train(initialize_from_checkpoint_path=str(saved), **changes), data=data)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(made.state).items()}, made


def test_the_whole_state_with_data_from_its_first_row(saved: Path, theirs: dict[str, np.ndarray]) -> None:
    state, made = begun(saved)
    assert state.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert made.jumps == (Jump(STEP, -STEP * BATCH),)
    assert made.notes == (f"begins with {saved / 'checkpoints' / '5'}",)
    assert made.state.params["embed"].sharding == partitioning.param_shardings(model(), mesh())["embed"]


def test_with_its_data_position_at_another_batch_size(saved: Path) -> None:
    assert begun(saved, reset_data_loader_on_init=False)[1].jumps == (Jump(STEP, 44 - STEP * BATCH),)
    assert begun(saved, reset_data_loader_on_init=False, initialize_weights_only=True)[1].jumps == (Jump(0, 44),)
    with pytest.raises(ValueError, match=r"had mixture='mmmm.*', and here it is 'other': set it to True"):
        begun(saved, reset_data_loader_on_init=False, data={"mixture": "other"})


def test_the_weights_alone_and_an_average_that_starts_as_they_are(saved: Path, theirs: dict[str, np.ndarray]) -> None:
    state, made = begun(saved, initialize_weights_only=True, ema_beta=0.9, optimizer="lion")
    assert (int(state["step"]), made.jumps) == (0, ())
    for name, value in theirs.items():
        if name.startswith("params/"):
            np.testing.assert_array_equal(state[name], value, err_msg=name)
            np.testing.assert_array_equal(state["ema_" + name], value, err_msg=name)
    assert all(not value.any() for name, value in state.items() if name.startswith("opt_state/"))


def test_what_is_missing_is_refused_with_its_names_or_begins_fresh(saved: Path, theirs: dict[str, np.ndarray]) -> None:
    other = model(qk_norm=True, vocab_size=62)
    with pytest.raises(
        ValueError, match=r"params/embed \(it has shape \(60, 32\) there, \(62, 32\) here\).*train\.allow_partial_checkpoint"
    ):
        begun(saved, of=other)
    state, made = begun(saved, of=other, allow_partial_checkpoint=True)
    assert "params/layers/q_norm (it is not stored)" in made.notes[1]
    np.testing.assert_array_equal(state["params/layers/wq"], theirs["params/layers/wq"])
    np.testing.assert_array_equal(state["params/layers/q_norm"], 1)
    np.testing.assert_array_equal(state["params/embed"], init_state(other, train(), mesh()).params["embed"])
    with pytest.raises(ValueError, match=r"set train\.initialize_weights_only to begin without its optimizer"):
        begun(saved, optimizer="adafactor")


def test_an_optimizer_is_known_by_name_whatever_stands_beside_it(saved: Path, theirs: dict[str, np.ndarray]) -> None:
    state, _ = begun(saved, max_grad_norm=None, update_rms_clipping=1.0)
    np.testing.assert_array_equal(state["opt_state/adamw/mu/layers/wq"], theirs["opt_state/adamw/mu/layers/wq"])
    with pytest.raises(ValueError, match=r"opt_state/lion/mu/embed \(it is not stored\)"):
        begun(saved, optimizer="lion")


def test_rows_of_another_tokenizers_tokens_are_refused_or_begin_fresh(saved: Path, theirs: dict[str, np.ndarray]) -> None:
    other = {"tokenizer": "o" * 64}
    with pytest.raises(ValueError, match=r"params/embed \(its rows are tokens of the tokenizer tttttttttttttttt, .* of oooooooooooooooo\)"):
        begun(saved, data=other, initialize_weights_only=True)
    state, made = begun(saved, data=other, allow_partial_checkpoint=True)
    for name in ("embed", "head"):
        np.testing.assert_array_equal(state[f"params/{name}"], init_state(model(), train(), mesh()).params[name])
        assert not state[f"opt_state/adamw/nu/{name}"].any()
    np.testing.assert_array_equal(state["opt_state/adamw/nu/layers/wq"], theirs["opt_state/adamw/nu/layers/wq"])
    assert "params/head (its rows are tokens of the tokenizer" in made.notes[1]


def test_a_hugging_face_tokenizer_is_compared_by_the_ids_it_gives(exported: Path, tmp_path: Path) -> None:
    texts = ["a quick brown fox jumps over lazy dogs", "say: area = width ** 2"] * 40
    ours, spelled, other = tmp_path / "ours.model", tmp_path / "spelled", tmp_path / "other"
    ours.write_bytes(train_sentencepiece(SentencePieceTraining(vocab_size=300), iter(texts)))
    for directory in (spelled, other):
        shutil.copytree(exported, directory)
    HfTokenizer(ours, vocab_size=300, seq_len=32).write(spelled)
    (other / "tokenizer.model").write_bytes(train_sentencepiece(SentencePieceTraining(vocab_size=310), iter(word[::-1] for word in texts)))
    assert begin(model(), train(initialize_from_hf=str(spelled)), tokenizer=ours).notes == (f"begins with {spelled}",)
    with pytest.raises(ValueError, match=r"params/embed \(its rows are tokens of .*other/tokenizer\.model, .* gives a text other ids\)"):
        begin(model(), train(initialize_from_hf=str(other)), tokenizer=ours)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other/tokenizer\.json cannot be compared .* take it away to begin without comparing"):
        begin(model(), train(initialize_from_hf=str(other)), tokenizer=ours)


def test_a_model_that_differs_without_another_shape_is_told_and_one_of_other_heads_refused(saved: Path) -> None:
    notes = begun(saved, of=model(rope=RopeConfig(theta=5e5), layer_norm_epsilon=1e-2))[1].notes
    assert "model.layer_norm_epsilon was 1e-05, is 0.01" in notes
    assert any(note.startswith("model.rope was {") for note in notes)
    with pytest.raises(ValueError, match=r"weights of other heads: model\.num_heads was 4, is 8; model\.num_kv_heads was 2, is 4"):
        begun(saved, of=model(num_heads=8, num_kv_heads=4))
    with pytest.raises(ValueError, match=r"weights of other heads: model\.num_kv_heads was 2, is 4"):
        begun(saved, of=model(num_kv_heads=4))


def test_a_run_that_ends_before_it_begins_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"is of step 5 and train\.num_train_steps=5: raise it"):
        begun(saved, num_train_steps=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initialize_from_checkpoint_path": "a", "initialize_from_hf": "b"}, "contradict each other"),
        ({"initialize_weights_only": True}, "has no effect without train.initialize_from_checkpoint_path"),
        ({"reset_data_loader_on_init": False, "initialize_from_hf": "b"}, "has no effect without train.initialize_from_checkpoint_path"),
        ({"allow_partial_checkpoint": True}, "has no effect where weights begin fresh"),
    ],
)
def test_settings_without_effect_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**fields)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    save_hf(directory, model(), jax.device_get(init_state(model(), train(seed=3), mesh()).params), max_shard_bytes=20_000)
    return directory


def test_hugging_face_weights_are_read_part_by_part(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    read = StoredTensors.read
    monkeypatch.setattr(StoredTensors, "read", lambda self, name, index: largest.append((part := read(self, name, index)).nbytes) or part)
    padded = model(pad_vocab_to_multiple_of=64)
    made = begin(padded, train(initialize_from_hf=str(exported), ema_beta=0.5))
    assert max(largest) == 60 * 32 * 4 // 4 + 4 * 32  # a quarter of the embedding, the largest of the tensors
    monkeypatch.undo()
    _, params = load_hf(exported)
    for tree in (made.state.params, made.state.ema_params):
        np.testing.assert_array_equal(tree["embed"][:60], params["embed"])
        assert not np.asarray(tree["embed"][60:]).any()
        np.testing.assert_array_equal(tree["head"][:, :60], params["head"])
        for name, value in params["layers"].items():
            np.testing.assert_array_equal(tree["layers"][name], value, err_msg=name)
    assert int(made.state.step) == 0


def test_what_a_hugging_face_directory_says_otherwise_is_told(exported: Path) -> None:
    stretched = model(rope=RopeConfig(theta=5e5))
    notes = begin(stretched, train(initialize_from_hf=str(exported))).notes
    assert notes[0] == f"begins with {exported}"
    assert "model.rope is {'type': 'default', 'theta': 10000.0" in notes[1]
    with pytest.raises(ValueError, match=r"params/layers/q_norm \(missing tensor model.layers.0.self_attn.q_norm.weight\)"):
        begin(model(qk_norm=True), train(initialize_from_hf=str(exported)))
    with pytest.raises(ValueError, match=r"weights of other heads: model\.num_heads is 4 there, 2 here"):
        begin(model(num_heads=2, num_kv_heads=2, head_dim=8), train(initialize_from_hf=str(exported)))
    with pytest.raises(
        ValueError, match=r"\(\d+, 32\), and floating point \(\d+, 32\) is needed: set model\.vocab_size=\d+, which its padding is part of"
    ):
        begin(model(vocab_size=40), train(initialize_from_hf=str(exported)))
    with pytest.raises(ValueError, match=r"params/layers/\w+ \(it has \d layers there, 1 here\)"):
        begin(model(num_layers=1), train(initialize_from_hf=str(exported)))


def test_the_plan_pins_the_checkpoint_and_identifies_it_by_content(saved: Path, exported: Path, tmp_path: Path) -> None:
    pinned, digest = pin_initial_weights(train(initialize_from_checkpoint_path=str(saved)))
    assert pinned.initialize_from_checkpoint_path == str(saved / "checkpoints" / "5")
    assert digest == pin_initial_weights(pinned)[1]
    hf = pin_initial_weights(train(initialize_from_hf=str(exported)))[1]
    assert hf not in (None, digest)
    assert pin_initial_weights(train()) == (train(), None)
    with pytest.raises(ValueError, match="hf download"):
        pin_initial_weights(train(initialize_from_hf=str(tmp_path)))


def test_a_run_goes_on_in_another_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "data")
    same = {"lr_schedule": "constant", "warmup": 0, "steps_per_eval": 1000, "sample_prompts": ()}
    status, _, err = finish(start(write_job(tmp_path / "whole", mixture, **same, num_train_steps=10, max_checkpoints=None)))
    assert status == 0, err
    job = write_job(
        tmp_path / "rest",
        mixture,
        **same,
        num_train_steps=10,
        initialize_from_checkpoint_path=str(tmp_path / "whole" / "checkpoints" / "4"),
        reset_data_loader_on_init=False,
    )
    job.write_text(json.dumps({**json.loads(job.read_text()), "fingerprint": "c" * 64}))
    status, events, err = finish(start(job))
    assert status == 0, err
    whole, rest = losses(tmp_path / "whole"), losses(tmp_path / "rest")
    assert sorted(rest) == [5, 6, 7, 8, 9, 10]
    assert {step: loss for step, (loss, _) in rest.items()} == {step: loss for step, (loss, _) in whole.items() if step > 4}
    assert any("begins with" in note for event in events if event["event"] == "start" for note in event["notes"])
