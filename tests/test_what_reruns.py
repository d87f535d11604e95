"""Every field of every configuration, changed in turn: exactly the steps that it decides run again, and they say which field it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from model.checkpoint_files import write_hashes
from model.config import LlamaConfig, RopeConfig
from model.optimizer_config import AdafactorConfig, LionConfig, MuonConfig, OutlierWindow, SophiaConfig
from model.train_config import SimpleTrainConfig
from tasks.artifacts import commit
from tasks.config import ExportConfig, RunConfig
from tasks.mixture_config import Dataset, Mixture, PromptCompletion, SimulatedEpoching
from tasks.pipeline import RunSteps, run_steps
from tasks.tokenize_config import TokenizeConfig
from tasks.vocabularies import SentencePieceTraining

TRAINED = {"checkpoints/run", "hf/run"}
MIXED = {"mixtures/mix", *TRAINED}
# The vocabulary of this run is trained on what is read of each dataset, so all are tokenized again.
EVERYTHING_READ = {"tokenizers/mix", "tokens/web", "tokens/books", *MIXED}

# Fields that no step is made again for: where and how a thing is done, what is logged, how often.
RUNTIME = {
    LlamaConfig: "use_flash_attention attn_backend flash_attention_block_size gradient_checkpointing scan_layers cross_entropy_block_size",
    SimpleTrainConfig: "accelerator_type slice_count data_parallel_size context_parallel_size tensor_parallel_size per_device_parallelism "
    "per_device_eval_parallelism env_vars compiler_options steps_per_eval steps_per_export steps_per_hf_export minutes_per_checkpoint "
    "max_checkpoints max_rollbacks steps_per_log steps_per_sample sample_prompts sample_tokens watch_norms watchdog_minutes "
    "profiler profiler_start_step profiler_num_steps",
    RunConfig: "tokenize track tags pool",
    ExportConfig: "hub_repo_id",
    Dataset: "sha256 licence homepage tags source_bytes allow_test_in_train allow_links",
    TokenizeConfig: "runner workers dask_address accelerator tries",
}

# Values where none follows from the field's type, or where a field has an effect beside others only: (before, after).
CHANGED: dict[tuple[type[BaseModel], str], tuple[dict[str, Any], dict[str, Any]]] = {
    (LlamaConfig, "head_dim"): ({}, {"head_dim": 64}),
    (LlamaConfig, "num_heads"): ({}, {"num_heads": 8}),
    (LlamaConfig, "num_kv_heads"): ({}, {"num_kv_heads": 4}),
    (LlamaConfig, "hidden_dim"): ({}, {"hidden_dim": 128}),
    (LlamaConfig, "sliding_window"): ({}, {"sliding_window": 32}),
    (LlamaConfig, "vocab_size"): ({}, {"vocab_size": 4096}),
    (LlamaConfig, "logit_soft_cap"): ({}, {"logit_soft_cap": 30.0}),
    (LlamaConfig, "flash_attention_block_size"): ({}, {"flash_attention_block_size": 256}),
    (LlamaConfig, "attn_backend"): ({}, {"attn_backend": "plain"}),
    (LlamaConfig, "rope"): ({}, {"rope": RopeConfig(theta=5e5)}),
    (SimpleTrainConfig, "train_seq_len"): ({}, {"train_seq_len": 32}),
    (SimpleTrainConfig, "data_seed"): ({}, {"data_seed": 1}),
    (SimpleTrainConfig, "muon"): ({"optimizer": "muon"}, {"muon": MuonConfig(momentum=0.9)}),
    (SimpleTrainConfig, "lion"): ({"optimizer": "lion"}, {"lion": LionConfig(beta1=0.8)}),
    (SimpleTrainConfig, "adafactor"): ({"optimizer": "adafactor"}, {"adafactor": AdafactorConfig(decay_rate=0.7)}),
    (SimpleTrainConfig, "sophia"): ({"optimizer": "sophia"}, {"sophia": SophiaConfig(gamma=0.1)}),
    (SimpleTrainConfig, "update_norm_window"): ({"clip_update_norm": True}, {"update_norm_window": OutlierWindow(sigma=4.0)}),
    (SimpleTrainConfig, "bad_step_window"): ({"skip_bad_steps": True}, {"bad_step_window": OutlierWindow(sigma=5.0)}),
    (SimpleTrainConfig, "ema_beta"): ({}, {"ema_beta": 0.99}),
    (SimpleTrainConfig, "update_rms_clipping"): ({}, {"update_rms_clipping": 1.0}),
    (SimpleTrainConfig, "decay"): ({}, {"decay": 0.2}),
    (SimpleTrainConfig, "cycle_length"): ({}, {"cycle_length": 50.0}),
    (SimpleTrainConfig, "cycles"): ({}, {"cycles": 2}),
    (SimpleTrainConfig, "rewarmup"): ({"cycles": 2}, {"rewarmup": 0.1}),
    (SimpleTrainConfig, "warmup"): ({}, {"warmup": 5.0}),
    (SimpleTrainConfig, "max_eval_batches"): ({}, {"max_eval_batches": 3}),
    (SimpleTrainConfig, "quantized_matmul"): ({}, {"quantized_matmul": "int8"}),
    (SimpleTrainConfig, "gradient_sum_dtype"): ({}, {"gradient_sum_dtype": "float32"}),
    (SimpleTrainConfig, "accelerator_type"): ({}, {"accelerator_type": "v4-128"}),
    (SimpleTrainConfig, "per_device_parallelism"): ({}, {"per_device_parallelism": 2}),
    (SimpleTrainConfig, "per_device_eval_parallelism"): ({}, {"per_device_eval_parallelism": 2}),
    (SimpleTrainConfig, "env_vars"): ({}, {"env_vars": {"A": "1"}}),
    (SimpleTrainConfig, "compiler_options"): ({}, {"compiler_options": {"a": "1"}}),
    (SimpleTrainConfig, "steps_per_hf_export"): ({}, {"steps_per_hf_export": -1}),
    (SimpleTrainConfig, "max_checkpoints"): ({}, {"max_checkpoints": 3}),
    (SimpleTrainConfig, "sample_prompts"): ({}, {"sample_prompts": ("A",)}),
    (SimpleTrainConfig, "initialize_from_checkpoint_path"): ({}, {"initialize_from_checkpoint_path": "CHECKPOINT"}),
    (SimpleTrainConfig, "initialize_from_hf"): ({}, {"initialize_from_hf": "HF"}),
    (SimpleTrainConfig, "initialize_weights_only"): (
        {"initialize_from_checkpoint_path": "CHECKPOINT"},
        {"initialize_weights_only": True},
    ),
    (SimpleTrainConfig, "reset_data_loader_on_init"): (
        {"initialize_from_checkpoint_path": "CHECKPOINT"},
        {"reset_data_loader_on_init": False},
    ),
    (SimpleTrainConfig, "allow_partial_checkpoint"): ({"initialize_from_hf": "HF"}, {"allow_partial_checkpoint": True}),
    (SimpleTrainConfig, "hf_generation_eos_token_ids"): ({}, {"hf_generation_eos_token_ids": (2, 3)}),
    (ExportConfig, "generation_eos_token_ids"): ({}, {"generation_eos_token_ids": (2, 3)}),
    (ExportConfig, "hub_repo_id"): ({}, {"hub_repo_id": "org/name"}),
    (Mixture, "weights"): ({}, {"weights": {"web": 1.0, "books": 3.0}}),
    (Mixture, "later_weights"): ({}, {"later_weights": ({"step": 10, "weights": {"books": 1.0}},)}),
    (Mixture, "tokenizer"): ({}, {"tokenizer": SentencePieceTraining(vocab_size=3000)}),
    (Mixture, "max_epochs"): ({}, {"max_epochs": {"web": 2.0}}),
    (Mixture, "holdout_tail"): ({}, {"holdout_tail": {"web": 5}}),
    (Mixture, "simulated_epoching"): ({}, {"simulated_epoching": SimulatedEpoching(experiment_tokens=10, target_tokens=20)}),
    (Dataset, "format"): ({}, {"format": "txt"}),
    (Dataset, "text_key"): ({}, {"text_key": "body"}),
    (Dataset, "answers"): ({"format": "jsonl", "document": "file"}, {"answers": PromptCompletion()}),
    (Dataset, "holdout"): ({}, {"holdout": 0.2}),
    (Dataset, "revision"): ({}, {"revision": "2"}),
    (Dataset, "licence"): ({}, {"licence": "MIT"}),
    (Dataset, "homepage"): ({}, {"homepage": "https://example.org"}),
    (Dataset, "tags"): ({}, {"tags": ("a/b",)}),
    (Dataset, "source_bytes"): ({}, {"source_bytes": 9}),
    (Dataset, "sha256"): ({}, {"sha256": {}}),
    (TokenizeConfig, "workers"): ({}, {"workers": 2}),
    (TokenizeConfig, "dask_address"): ({"runner": "dask"}, {"dask_address": "tcp://a:1"}),
}

# Fields with other consequences than those of their class.
STEPS: dict[tuple[type[BaseModel], str], set[str]] = {
    (SimpleTrainConfig, "hf_generation_eos_token_ids"): {"hf/run"},
    (SimpleTrainConfig, "initialize_from_checkpoint_path"): TRAINED,
    (SimpleTrainConfig, "initialize_from_hf"): TRAINED,
    (Mixture, "tokenizer"): EVERYTHING_READ,
    (Mixture, "holdout_tail"): EVERYTHING_READ,  # the vocabulary must not see what is held out
    (Dataset, "revision"): {"raw/web", *EVERYTHING_READ},
}
SECTION = {LlamaConfig: "model", SimpleTrainConfig: "train", ExportConfig: "export", TokenizeConfig: "tokenize", Mixture: "data"}
NAMED = {
    (SimpleTrainConfig, "hf_generation_eos_token_ids"): "generation_eos_token_ids",
    (SimpleTrainConfig, "initialize_from_checkpoint_path"): "initial_weights",  # by what lies there, not by its path
    (SimpleTrainConfig, "initialize_from_hf"): "initial_weights",
    (Mixture, "weights"): "shares",
    (Mixture, "later_weights"): "stages",
    (Mixture, "tokenizer"): "vocab_size",
}
# What they are is not for a field to change: names are part of where a thing lies; datasets and sources are other data.
APART = {(Mixture, "name"), (Mixture, "datasets"), (Dataset, "name"), (Dataset, "source")}
APART |= {(Dataset, name) for name in ("seqio_task", "seqio_mixture", "seqio_module")}
APART |= {(SimpleTrainConfig, "steps_per_task_eval")}  # of default_train, which makes it another field
CASES = [
    (kind, name)
    for kind in (LlamaConfig, SimpleTrainConfig, ExportConfig, TokenizeConfig, Mixture, Dataset)
    for name in kind.model_fields
    if (kind, name) not in APART
]


class Place:
    """Two files of text, weights to begin with, and roots in which runs are committed as if they had been made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("web", "books"):
            (directory / f"{name}.txt").write_text(f"{name}\n")
        self.weights = {"CHECKPOINT": directory / "run" / "checkpoints" / "5", "HF": directory / "hf"}
        for place in self.weights.values():
            place.mkdir(parents=True)
        (self.weights["CHECKPOINT"] / "state").write_text("state")
        write_hashes(self.weights["CHECKPOINT"])
        for name in ("config.json", "model.safetensors"):
            (self.weights["HF"] / name).write_text(name)

    def steps(self, changes: dict[type[BaseModel], dict[str, Any]]) -> RunSteps:
        """The steps of the run with some fields of its parts set."""

        def given(kind: type[BaseModel], **plain: Any) -> dict[str, Any]:
            fields = {**plain, **changes.get(kind, {})}
            return {name: str(self.weights.get(value, value)) if isinstance(value, str) else value for name, value in fields.items()}

        web = {"name": "web", "source": str(self.directory / "web.txt"), "document": "paragraph", "holdout": 0.1}
        books = Dataset(name="books", source=str(self.directory / "books.txt"), holdout=0.1)
        data = {"name": "mix", "datasets": (Dataset(**given(Dataset, **web)), books), "weights": {"web": 1.0, "books": 1.0}}
        model = {"seq_len": 64, "hidden_dim": 64, "intermediate_dim": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        train = {"train_batch_size": 4, "num_train_steps": 100, "learning_rate": 1e-3}
        config = RunConfig(
            name="run",
            model=LlamaConfig(**given(LlamaConfig, **model)),
            train=SimpleTrainConfig(**given(SimpleTrainConfig, **train)),
            data=Mixture(**{"tokenizer": SentencePieceTraining(), **data, **changes.get(Mixture, {})}),
            tokenize=TokenizeConfig(**given(TokenizeConfig)),
            export=ExportConfig(**given(ExportConfig)),
        )
        return run_steps(config)

    def root_with(self, before: dict[type[BaseModel], dict[str, Any]]) -> Path:
        """A root in which every step of the run with these fields is there, and nothing else, as after a run."""
        steps = self.steps(before)
        root = self.directory / steps.export.fingerprint
        for step in steps.all:
            directory = step.directory(root)
            assert isinstance(directory, Path)
            if not directory.exists():
                directory.mkdir(parents=True)
                commit(directory, step, stats={}, files=[])
        return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("run"))


def another(kind: type[BaseModel], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields to set before, and the change."""
    if (kind, name) in CHANGED:
        return CHANGED[kind, name]
    field = kind.model_fields[name]
    value = {"train_batch_size": 4, "num_train_steps": 100, "learning_rate": 1e-3, "document": "paragraph"}.get(name, field.default)
    if isinstance(value, bool):
        return {}, {name: not value}
    if isinstance(value, int):
        return {}, {name: value * 2 or 1}
    if isinstance(value, float):
        return {}, {name: value / 2 or 0.5}
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str) and choice != value]
    assert choices, f"{kind.__name__}.{name}: give it another value in CHANGED"
    return {}, {name: choices[0]}


def expected_steps(kind: type[BaseModel], name: str) -> set[str]:
    if (kind, name) in STEPS:
        return STEPS[kind, name]
    if name in RUNTIME.get(kind, "").split():
        return set()
    return {
        LlamaConfig: TRAINED,
        SimpleTrainConfig: TRAINED,
        ExportConfig: {"hf/run"},
        Mixture: MIXED,
        Dataset: EVERYTHING_READ,
    }[kind]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda part: part if isinstance(part, str) else SECTION.get(part, "dataset"))
def test_exactly_what_a_field_decides_runs_again(kind: type[BaseModel], name: str, place: Place) -> None:
    before, change = another(kind, name)
    root = place.root_with({kind: before})
    reasons = {f"{step.kind}/{step.name}": step.explain_miss(root) for step in place.steps({kind: {**before, **change}}).all}
    again = {step: why for step, why in reasons.items() if why}
    assert {*again} == expected_steps(kind, name), again
    for step, why in again.items():
        assert NAMED.get((kind, name), name) in why, (step, why)


def test_every_runtime_field_is_one() -> None:
    for kind, names in RUNTIME.items():
        assert {*names.split()} <= {*kind.model_fields}
