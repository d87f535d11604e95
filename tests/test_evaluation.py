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
from model.evaluation import evaluate
from model.llama import forward
from model.losses import LossSums
from model.mixture_store import MixtureStore
from model.parameters import init_params
from model.train_config import SimpleTrainConfig
from model.train_step import loss_sums
from tests.synthetic_stores import write_mixture

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
