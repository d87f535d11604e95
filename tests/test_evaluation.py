"""Held-out numbers against a direct computation over the same tokens."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from model import partitioning
from model.batches import EvalBatches
from model.config import LlamaConfig
from model.evaluation import HeldOut, by_tag, evaluate
from model.hf import load_hf
from model.llama import forward
from model.losses import LossSums
from model.mixture_store import MixtureStore
from model.parameters import init_params
from model.train_config import SimpleTrainConfig
from model.train_step import loss_sums
from model.vocabularies.vocabulary import Vocabulary
from tasks.readers.text_reader import split_of
from tests.synthetic_stores import write_mixture
from tests.trained_run import TRAIN as TRAINED
from tests.trained_run import trained_run

SEQ_LEN, VOCAB = 16, 64
CONFIG = LlamaConfig(seq_len=SEQ_LEN, hidden_dim=16, intermediate_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=VOCAB)
TRAIN = SimpleTrainConfig(train_batch_size=4, num_train_steps=1, learning_rate=1.0, compute_dtype="float32", z_loss_weight=0.1)


@pytest.fixture
def components(tmp_path: Path) -> list[EvalBatches]:
    mixture = MixtureStore.open(write_mixture(tmp_path, {"a": 0.5, "b": 0.5}, vocab_size=VOCAB))
    return [EvalBatches(mixture, name, seq_len=SEQ_LEN, batch_size=4) for name in mixture.validation_names()]


def test_nats_and_bits_against_the_logits_themselves(components: list[EvalBatches]) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    metrics = evaluate(lambda p, batch: loss_sums(p, batch, CONFIG, TRAIN, mesh), params, components, partitioning.batch_sharding(mesh))
    total_nats = total_tokens = total_bytes = 0.0
    for component in components:
        nats = tokens = 0.0
        for rows in component:
            logits = forward(params, rows["tokens"], CONFIG, segment_ids=rows["segment_ids"], positions=rows["positions"])
            log_probability = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rows["targets"][..., None], -1)[..., 0]
            nats -= float((log_probability * rows["loss_weights"]).sum())
            tokens += float(rows["loss_weights"].sum())
        assert tokens == component.scored_tokens
        assert metrics[f"eval/{component.name}/loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert metrics[f"eval/{component.name}/bpb"] == pytest.approx(nats / math.log(2) / component.bytes, rel=1e-5)
        total_nats, total_tokens, total_bytes = total_nats + nats, total_tokens + tokens, total_bytes + component.bytes
    # Weighted by tokens and bytes, not a mean of means.
    assert metrics["eval/loss"] == pytest.approx(total_nats / total_tokens, rel=1e-5)
    assert metrics["eval/bpb"] == pytest.approx(total_nats / math.log(2) / total_bytes, rel=1e-5)
    for name in ("loss", "bpb"):  # and these are
        assert metrics[f"eval/macro_{name}"] == pytest.approx((metrics[f"eval/a/{name}"] + metrics[f"eval/b/{name}"]) / 2)
        assert metrics[f"eval/macro_{name}"] != metrics[f"eval/{name}"]


def test_bits_per_byte_are_those_of_the_raw_text_document_by_document() -> None:
    run = trained_run()
    config, params = load_hf(run.hf)
    vocabulary = Vocabulary.open(MixtureStore.open(run.mixture).tokenizer.path)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    # one row holds all of it: in shorter ones a document that is cut loses what was before it, and the loss is a little higher
    held_out = [EvalBatches(run.mixture, "web", seq_len=2048, batch_size=1)]
    assert len(held_out[0]) == 1
    metrics = evaluate(lambda p, batch: loss_sums(p, batch, config, TRAINED, mesh), params, held_out, partitioning.batch_sharding(mesh))
    texts = [line for line in run.lines if split_of(line, 0.2) == "validation"]
    assert len(texts) > 20
    nats, tokens = 0.0, 0
    logits_of = jax.jit(forward, static_argnums=2)
    for text in texts:
        ids = np.array([vocabulary.bos_id, *vocabulary.encode(text).tolist(), vocabulary.eos_id])
        padded = np.zeros((1, config.seq_len), np.int32)
        padded[0, : len(ids)] = ids
        log_probability = np.asarray(jax.nn.log_softmax(logits_of(params, padded, config)[0]), np.float64)
        nats -= log_probability[np.arange(len(ids) - 1), ids[1:]].sum()
        tokens += len(ids) - 1
    assert metrics["eval/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["eval/bpb"] == pytest.approx(nats / (math.log(2) * sum(len(text.encode()) for text in texts)), rel=1e-5)
    assert metrics["eval/bpb"] < 5, "it has learnt something"


def test_tags_are_weighed_by_tokens_and_bytes_and_descend() -> None:
    scored = {"a": HeldOut(20.0, 10.0, 8.0), "b": HeldOut(30.0, 30.0, 100.0), "c": HeldOut(7.0, 7.0, None), "d": HeldOut(1.0, 1.0, 1.0)}
    metrics = by_tag(scored, {"a": ("news/a",), "b": ("news/b", "news"), "c": ("mixed",), "d": ("mixed",)})
    bits = math.log(2)
    assert metrics == pytest.approx(
        {
            **{"eval/news/loss": 50 / 40, "eval/news/micro_loss": 50 / 40, "eval/news/macro_loss": 1.5},
            **{"eval/news/bpb": 50 / 108 / bits, "eval/news/macro_bpb": (20 / 8 + 30 / 100) / 2 / bits},
            **{"eval/news/a/loss": 2.0, "eval/news/a/bpb": 20 / 8 / bits, "eval/news/b/loss": 1.0, "eval/news/b/bpb": 0.3 / bits},
            # one of the two has no bytes: no bits per byte for both together
            **{"eval/mixed/loss": 1.0, "eval/mixed/micro_loss": 1.0, "eval/mixed/macro_loss": 1.0},
        }
    )


def test_tags_reach_the_evaluation(components: list[EvalBatches]) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    metrics = evaluate(
        lambda p, batch: loss_sums(p, batch, CONFIG, TRAIN, mesh),
        params,
        components,
        partitioning.batch_sharding(mesh),
        max_batches=1,
        tags={"a": ("all",), "b": ("all",)},
    )
    assert metrics["eval/all/loss"] == metrics["eval/loss"]
    assert metrics["eval/all/macro_loss"] == metrics["eval/macro_loss"]


def test_a_component_cut_short_has_no_bits_per_byte(components: list[EvalBatches]) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    metrics = evaluate(
        lambda p, batch: loss_sums(p, batch, CONFIG, TRAIN, mesh),
        params,
        components,
        partitioning.batch_sharding(mesh),
        max_batches=1,
    )
    assert len(components[0]) > 1
    assert "eval/loss" in metrics
    assert not any(name.endswith("bpb") for name in metrics)


def test_text_of_unknown_size_has_a_loss_and_no_bits_per_byte(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"a": 1.0}, vocab_size=64, bos_id=None)
    batches = EvalBatches(mixture, "a", seq_len=16, batch_size=4)
    assert batches.bytes is None
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sums = LossSums(*(jax.numpy.float32(value) for value in (2.0, 2.0, 0.0, 4.0)))
    metrics = evaluate(lambda params, batch: sums, None, [batches], sharding)
    assert metrics["eval/a/loss"] == pytest.approx(0.5)
    assert not any(key.endswith("bpb") for key in metrics)
