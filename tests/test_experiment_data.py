"""Data and runs under the guide's names: what an experiment's file may write, and what is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import LlamaConfig
from model.learning_rate import learning_rate_schedule
from model.train_config import SimpleTrainConfig
from tasks.anneal import AnnealConfig, anneal_after, checkpoint_step, default_anneal, last_checkpoint
from tasks.catalogue import dclm_mixture_config_llama3, fineweb_edu, llama3_tokenizer, paloma
from tasks.config import EvalHarnessConfig, RunConfig
from tasks.datasets import Dataset, Mixture, PromptCompletion, Reading, SentencePieceTraining, shakespeare_mixture
from tasks.experiment import default_train, simulated_epoching_train, versioned
from tasks.experiment_data import (
    as_mixture,
    default_download,
    default_tokenize,
    interpolate_mixture_configs,
    lm_mixture_data_config,
    tokenizer_named,
    with_default_validation,
)

MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=1, num_heads=2, num_kv_heads=1)
TRAIN = SimpleTrainConfig(train_batch_size=4, num_train_steps=10, learning_rate=1e-3)
COMMIT = "65cd6fc59dba021b21db414fa5e8d7765ffbe5e6"


def test_a_download_is_a_dataset_at_a_commit() -> None:
    raw = default_download("stories", "roneneldan/TinyStories", COMMIT, ["data/train-*.parquet"], format="parquet", licence="CDLA")
    assert raw.sources == (f"hf://datasets/roneneldan/TinyStories@{COMMIT}/data/train-*.parquet",)
    assert (raw.revision, raw.format, raw.licence) == (COMMIT, "parquet", "CDLA")
    with pytest.raises(ValueError, match=r"hf_urls_glob=\(\) names no file of roneneldan/TinyStories"):
        default_download("stories", "roneneldan/TinyStories", COMMIT)


def test_tokenizing_says_the_tokenizer_and_how_documents_are_read() -> None:
    raw = default_download("stories", "roneneldan/TinyStories", COMMIT, ["*.parquet"])
    part = default_tokenize("tiny_stories", raw, "meta-llama/Meta-Llama-3.1-8B", Reading(text_key="story"))
    assert (part.dataset.name, part.dataset.text_key, part.tokenizer) == ("tiny_stories", "story", llama3_tokenizer)
    assert default_tokenize("qa", raw, llama3_tokenizer, PromptCompletion()).dataset.answers == PromptCompletion()
    assert default_tokenize("held_out", "mine/*.txt", SentencePieceTraining(), is_validation=True).dataset.holdout == 1.0
    assert tokenizer_named("mine/tokenizer.model").kind == "sentencepiece"
    with pytest.raises(ValueError, match=r"'roneneldan/TinyStories' is a name on the hub without a commit"):
        default_tokenize("stories", "roneneldan/TinyStories", llama3_tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer='gpt2' is not known by name: give 'meta-llama/Meta-Llama-3.1-8B', a file"):
        default_tokenize("stories", "a/*.txt", "gpt2")


def test_a_mixture_of_components() -> None:
    web, books = (default_tokenize(name, f"{name}/*.txt", SentencePieceTraining()) for name in ("web", "books"))
    held_out = default_tokenize("held_out", "c/*.txt", SentencePieceTraining(), is_validation=True)
    mixture = lm_mixture_data_config({"web": web, "books": books, "held_out": held_out}, {"web": 3, "books": 1}, name="mine")
    assert mixture.shares()[0]["shares"] == {"web": 0.75, "books": 0.25}
    assert not mixture.is_trained("held_out")
    with pytest.raises(ValueError, match=r"'held_out' has no weight"):
        lm_mixture_data_config({"web": web, "held_out": held_out}, {"web": 1.0}, missing_weights_are_validation=False)
    other = default_tokenize("other", "d/*.txt", SentencePieceTraining(vocab_size=999))
    with pytest.raises(ValueError, match=r"'other' has another tokenizer than 'web'"):
        lm_mixture_data_config({"web": web, "other": other}, {"web": 1.0, "other": 1.0})
    with pytest.raises(ValueError, match=r"has no tokenizer"):
        lm_mixture_data_config({"web": web.dataset}, {"web": 1.0})
    assert as_mixture(web).weights == {"web": 1.0}


def test_a_mixture_between_mixtures_has_the_mean_of_their_shares() -> None:
    mixture = shakespeare_mixture()
    even = mixture.model_copy(update={"weights": {"plays": 5.0, "sonnets": 5.0}})
    between = interpolate_mixture_configs([mixture, even], [0.5, 0.5])
    assert between.shares()[0]["shares"] == pytest.approx({"plays": 0.7, "sonnets": 0.3})
    with pytest.raises(ValueError, match=r"2 mixtures and 1 weights"):
        interpolate_mixture_configs([mixture, even], [1.0])
    limited = [Mixture(**{**dict(mixture), "max_epochs": {"plays": epochs}}) for epochs in (2, 5)]
    assert interpolate_mixture_configs([mixture, limited[1]], [0.5, 0.5]).max_epochs == {"plays": 5}
    with pytest.raises(ValueError, match=r"different max_epochs of 'plays', 2.* and 5"):
        interpolate_mixture_configs(limited, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"differ in tokenizer"):
        interpolate_mixture_configs([mixture, mixture.model_copy(update={"tokenizer": llama3_tokenizer})], [0.5, 0.5])


def test_validation_by_default_where_all_is_downloaded_anyway() -> None:
    own = shakespeare_mixture()
    web = Mixture(name="web", datasets=(fineweb_edu,), weights={"fineweb_edu": 1.0}, tokenizer=llama3_tokenizer)
    assert with_default_validation(own) is own
    assert default_train("mine", own, MODEL, TRAIN).data == own
    added = with_default_validation(web)
    assert [dataset.name for dataset in added.datasets] == ["fineweb_edu", *(dataset.name for dataset in paloma.values())]
    assert added.shares() == web.shares()
    assert with_default_validation(web, False) is web
    assert len(with_default_validation(own, True).datasets) == 18
    assert with_default_validation(dclm_mixture_config_llama3) is dclm_mixture_config_llama3


def test_simulated_epoching_is_of_this_runs_tokens() -> None:
    run = simulated_epoching_train("sim", shakespeare_mixture(), MODEL, TRAIN, target_budget=25_600)
    simulated = run.data.simulated_epoching
    assert simulated is not None
    assert (simulated.experiment_tokens, simulated.target_tokens) == (4 * 10 * 64, 25_600)
    with pytest.raises(ValueError, match=r"target_budget=100 is below the 2560 tokens of this run"):
        simulated_epoching_train("sim", shakespeare_mixture(), MODEL, TRAIN, target_budget=100)


def test_one_text_is_no_list() -> None:
    for field in ("tags", "eval_harness_tasks", "track"):
        with pytest.raises(ValueError, match=rf"{field}='core' is one text where a list is meant: write \['core'\]"):
            default_train("mine", shakespeare_mixture(), MODEL, TRAIN, **{field: "core"})  # pyright: ignore[reportArgumentType]


def test_a_model_as_the_guide_writes_it() -> None:
    sizes = {"hidden_dim": 32, "intermediate_dim": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    nothing = {
        "use_bias": False,
        "upcast_attn": False,
        "reference_checkpoint": None,
        "attn_backend": None,
        "cross_entropy_block_size": None,
    }
    assert LlamaConfig(max_seq_len=64, **sizes, **nothing) == MODEL  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match=r"model\.use_bias=True is of no use here: set model\.attention_bias and model\.mlp_bias"):
        LlamaConfig(**sizes, use_bias=True)  # pyright: ignore[reportCallIssue]


def test_tasks_of_lm_eval_are_said_once() -> None:
    run = default_train("mine", shakespeare_mixture(), MODEL, TRAIN, eval_harness_tasks=["piqa:10"])
    assert run.eval_harness == EvalHarnessConfig(tasks=("piqa:10",))
    with pytest.raises(ValueError, match=r"eval_harness_tasks=\['piqa:10'\] and eval_harness say the same"):
        default_train("mine", shakespeare_mixture(), MODEL, TRAIN, eval_harness_tasks=["piqa:10"], eval_harness=EvalHarnessConfig())
    often = SimpleTrainConfig(**{**dict(TRAIN), "steps_per_task_eval": 500})
    for harness in (EvalHarnessConfig(tasks=("piqa:10",)), EvalHarnessConfig(tasks=("piqa:10",), steps=500)):
        run = default_train("mine", shakespeare_mixture(), MODEL, often, eval_harness=harness)
        assert (run.eval_harness.steps, run.train) == (500, TRAIN)
    with pytest.raises(ValueError, match=r"train.steps_per_task_eval=500 and eval_harness.steps=250 contradict each other"):
        default_train("mine", shakespeare_mixture(), MODEL, often, eval_harness=EvalHarnessConfig(tasks=("piqa:10",), steps=250))
    with pytest.raises(ValueError, match=r"train.steps_per_task_eval=500 is read by default_train alone: set eval_harness.steps"):
        RunConfig(name="mine", model=MODEL, train=often, data=shakespeare_mixture())
    assert versioned(3) == 3


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_an_anneal_falls_from_the_learning_rate_at_the_checkpoint(ratio: float) -> None:
    given = {"dataset_config": shakespeare_mixture(), "llama_config": MODEL, "train_batch_size": 4, "learning_rate": 2e-3}
    tokens = 4 * 64 * 50
    config = AnnealConfig(
        **given, min_lr_ratio=ratio, num_anneal_training_tokens=tokens, initialize_from_checkpoint_path="somewhere/checkpoints/150"
    )
    train = default_anneal("cool", config).train
    rate = learning_rate_schedule(train)
    assert (train.num_train_steps, train.weight_decay) == (200, 0.05)
    assert float(rate(150)) == pytest.approx(2e-3, rel=1e-5)
    assert float(rate(175)) == pytest.approx((2e-3 + ratio * 2e-3) / 2, rel=1e-4)
    assert float(rate(200)) == pytest.approx(ratio * 2e-3, rel=1e-4, abs=1e-9)


def test_an_anneal_says_where_it_cannot_begin(tmp_path: Path) -> None:
    assert checkpoint_step("gs://bucket/run/checkpoints/step-4000") == 4000
    with pytest.raises(ValueError, match=r"names no step and holds none: train that run first, or give RUN/checkpoints/STEP"):
        checkpoint_step(str(tmp_path))
    with pytest.raises(ValueError, match=r"anneal.lr_schedule='cosine': .* initialize_weights_only"):
        AnnealConfig(dataset_config=shakespeare_mixture(), initialize_from_checkpoint_path="a/1", lr_schedule="cosine")


def test_an_anneal_of_a_run_beside_it_begins_at_its_last_step(tmp_path: Path) -> None:
    base = default_train("base", shakespeare_mixture(), MODEL, TRAIN)
    later = anneal_after("later", base, dataset_config=shakespeare_mixture(), num_anneal_training_tokens=4 * 64 * 5, train_batch_size=4)
    assert not later.is_ready(tmp_path)
    run = later.begun(tmp_path)
    assert run.train.num_train_steps == 15
    assert run.train.initialize_from_checkpoint_path == str(last_checkpoint(base, tmp_path))
    assert Path(str(last_checkpoint(base, tmp_path))).parts[-2:] == ("checkpoints", "10")
    assert run.model == base.model
    with pytest.raises(ValueError, match=r"AnnealConfig has no field 'batch_size'"):
        anneal_after("later", base, dataset_config=shakespeare_mixture(), batch_size=4)


def test_a_dataset_of_another_name_in_the_mixture_is_renamed() -> None:
    part = Dataset(name="a", source="a/*.txt")
    mixture = lm_mixture_data_config({"b": part}, {"b": 1.0}, tokenizer=SentencePieceTraining())
    assert mixture.datasets[0].name == "b"
