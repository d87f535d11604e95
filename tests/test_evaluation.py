"""Held-out numbers against a direct computation over the same tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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
from model.target_bytes import target_bytes
from model.token_store import TokenStore
from model.train_config import SimpleTrainConfig
from model.train_step import loss_sums
from model.vocabularies.vocabulary import Vocabulary
from tasks.readers.text_reader import split_of
from tests.synthetic_stores import store_writer, write_manifest, write_mixture
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
    scored = {"a": HeldOut(20.0, 10.0, 8.0), "b": HeldOut(30.0, 30.0, 100.0), "c": HeldOut(7.0, 7.0, 7.0), "d": HeldOut(1.0, 1.0, 1.0)}
    metrics = by_tag(scored, {"a": ("news/a",), "b": ("news/b", "news"), "c": ("mixed",), "d": ("mixed",)})
    bits = math.log(2)
    assert metrics == pytest.approx(
        {
            **{"eval/news/loss": 50 / 40, "eval/news/micro_loss": 50 / 40, "eval/news/macro_loss": 1.5},
            **{"eval/news/bpb": 50 / 108 / bits, "eval/news/macro_bpb": (20 / 8 + 30 / 100) / 2 / bits},
            **{"eval/news/a/loss": 2.0, "eval/news/a/bpb": 20 / 8 / bits, "eval/news/b/loss": 1.0, "eval/news/b/bpb": 0.3 / bits},
            **{"eval/mixed/loss": 1.0, "eval/mixed/micro_loss": 1.0, "eval/mixed/macro_loss": 1.0},
            **{"eval/mixed/bpb": 1.0 / bits, "eval/mixed/macro_bpb": 1.0 / bits},
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
        tags={"a": ("all",), "b": ("all",)},
    )
    assert metrics["eval/all/loss"] == metrics["eval/loss"]
    assert metrics["eval/all/macro_loss"] == metrics["eval/macro_loss"]


def test_what_a_cut_dataset_scores_does_not_depend_on_the_size_of_a_batch() -> None:
    run = trained_run()
    scored: list[list[int]] = []
    for batch_size in (1, 3, 4, 16):
        batches = EvalBatches(run.mixture, "web", seq_len=SEQ_LEN, batch_size=batch_size, max_rows=7)
        scored.append([token for batch in batches for token in batch["targets"][batch["loss_weights"] > 0].tolist()])
        assert batches.scored_tokens == len(scored[-1])
    assert 0 < len(scored[0]) <= 7 * SEQ_LEN
    assert all(one == scored[0] for one in scored)


@pytest.mark.parametrize("cut", ["batches", "answers", "no BOS"])
def test_of_a_part_of_the_text_the_bytes_are_those_of_the_scored_tokens(tmp_path: Path, cut: str) -> None:
    bos_id = None if cut == "no BOS" else 1
    mixture = write_mixture(tmp_path, {"a": 0.5, "b": 0.5}, vocab_size=259, bos_id=bos_id, masked=("a",) if cut == "answers" else ())
    (Path(mixture.path) / "tokenizer").mkdir()
    Vocabulary.open_bytes().write(Path(mixture.path) / "tokenizer")
    asked: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": 4, "max_rows": 7 if cut == "batches" else None}
    opened = MixtureStore.open(mixture)
    # each of several processes counts the rows of all
    a, b = [EvalBatches(opened, name, **asked, process_index=1, process_count=2) for name in "ab"]
    split = opened.component("a").split("validation")
    assert split is not None
    expected = scored = 0
    for batch in EvalBatches(opened, "a", **asked):
        targets = batch["targets"][batch["loss_weights"] > 0]
        scored += len(targets)
        expected += int((targets >= 3).sum())
    assert (a.bytes, a.scored_tokens) == (expected, scored)
    assert 0 < expected < split.source_bytes
    assert (b.bytes == opened.component("b").splits["validation"].source_bytes) == (cut == "answers")
    sums = LossSums(*(jax.numpy.float32(value) for value in (2.0, 2.0, 0.0, 4.0)))
    metrics = evaluate(lambda params, batch: sums, None, [a, b], jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    nats = 2.0 * len(a)
    assert metrics["eval/a/bpb"] == pytest.approx(nats / math.log(2) / expected)
    assert metrics["eval/bpb"] == pytest.approx((nats + 2.0 * len(b)) / math.log(2) / (expected + b.bytes))
    assert metrics["eval/a/loss"] == pytest.approx(0.5)


def test_the_bytes_of_the_first_documents_are_those_of_their_text() -> None:
    run = trained_run()
    mixture = MixtureStore.open(run.mixture)
    split = mixture.component("web").split("validation")
    assert split is not None
    texts = [line for line in run.lines if split_of(line, 0.2) == "validation"]
    starts = split.document_starts(0, split.num_tokens).tolist()
    for documents in (1, 2, 7, len(starts) - 1):
        part = EvalBatches(run.mixture, "web", seq_len=starts[documents], batch_size=1, max_rows=1)
        # SentencePiece's space before each document is no byte of it
        assert part.bytes == sum(len(text.encode()) for text in texts[:documents])
        assert part.scored_tokens == starts[documents] - documents
    whole = EvalBatches(run.mixture, "web", seq_len=split.num_tokens, batch_size=1)
    assert whole.bytes == split.source_bytes == target_bytes(split, split.num_tokens, 1, *mixture.tokenizer.byte_lengths)


def test_bytes_are_counted_alike_whatever_the_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = MixtureStore.open(write_mixture(tmp_path, {"a": 1.0}, masked=("a",)))
    split = opened.component("a").split("validation")
    assert split is not None
    within, opening = np.arange(512), np.arange(512) + 1000
    stream, mask = split.tokens(0, split.num_tokens).astype(np.int64), split.loss_mask(0, split.num_tokens).astype(np.int64)
    starts = split.document_starts(0, split.num_tokens)
    sizes = stream.copy()
    sizes[starts + 1] += 1000
    sizes[starts] = 0
    for block in (1, 3, 50, 1 << 20):
        monkeypatch.setattr("model.target_bytes._BLOCK", block)
        for stop in (2, 60, split.num_tokens):
            assert target_bytes(split, stop, 1, within, opening) == (sizes * mask)[1:stop].sum()


def test_a_document_that_does_not_begin_with_bos_has_no_opening_token(tmp_path: Path) -> None:
    writer = store_writer(tmp_path, loss_mask=True)
    with writer.shard("validation", 0, 1, key="k") as shard:
        shard.add(np.array([7, 8, 9]), 3, np.ones(3, bool))
        shard.add(np.array([1, 8, 9]), 3, np.ones(3, bool))
        shard.add(np.array([1]), 0, np.ones(1, bool))
    write_manifest(tmp_path, "tokens", "a", "a" * 64, writer.stats({"validation": 1}))
    split = TokenStore.open(tmp_path).splits["validation"]
    assert target_bytes(split, split.num_tokens, 1, np.full(512, 10), np.full(512, 9)) == 10 + 10 + 9 + 10


def test_where_nothing_scored_is_text_there_are_no_bits_per_byte() -> None:
    metrics = by_tag({"a": HeldOut(20.0, 10.0, 0.0), "b": HeldOut(30.0, 30.0, 10.0)}, {"a": ("t/a",), "b": ("t",)})
    assert "eval/t/a/bpb" not in metrics
    assert "eval/t/macro_bpb" not in metrics
    assert metrics["eval/t/bpb"] == pytest.approx(5 / math.log(2))
