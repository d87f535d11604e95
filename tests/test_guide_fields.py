"""Every argument of the guide's SimpleTrainConfig is taken under its own name, or refused with what to write instead."""

from __future__ import annotations

from typing import Any

import pytest

from model.guide_fields import ResourceConfig, TpuPodConfig, WatchConfig
from model.optimizer_config import LionConfig, MuonConfig
from model.train_config import SimpleTrainConfig

REQUIRED: dict[str, Any] = {"train_batch_size": 8, "num_train_steps": 100, "learning_rate": 1e-3}
PLAIN = SimpleTrainConfig(**REQUIRED)

# the fields of Marin's SimpleTrainConfig with their defaults there
GUIDE: dict[str, Any] = {
    "train_seq_len": None,
    "data_seed": None,
    "weight_decay": None,
    "beta1": None,
    "beta2": None,
    "epsilon": None,
    "warmup": None,
    "decay": None,
    "rewarmup": None,
    "lr_schedule": None,
    "min_lr_ratio": None,
    "cycle_length": None,
    "z_loss_weight": None,
    "ema_beta": None,
    "skip_bad_steps": False,
    "steps_per_eval": None,
    "steps_per_export": 10000,
    "steps_per_task_eval": None,
    "steps_per_hf_export": None,
    "hf_generation_eos_token_ids": None,
    "per_device_parallelism": -1,
    "per_device_eval_parallelism": None,
    "max_eval_batches": None,
    "initialize_from_checkpoint_path": None,
    "initialize_from_hf": None,
    "reset_data_loader_on_init": True,
    "allow_partial_checkpoint": False,
    "int8": False,
    "pad_tokenizer_to_match_model": False,
    "optimizer_config": None,
    "watch": None,
    "profiler": False,
    "profiler_start_step": 5,
    "profiler_num_steps": 100,
    "explicit_mesh_axes": False,
    "tensor_parallel_size": 1,
    "env_vars": None,
}


@pytest.mark.parametrize(("field", "value"), GUIDE.items())
def test_the_defaults_of_the_guide_are_the_defaults_here(field: str, value: Any) -> None:
    assert SimpleTrainConfig(**REQUIRED, **{field: value}) == PLAIN


def test_none_stands_for_the_optimizers_own_values() -> None:
    """Those of Levanter's AdamConfig, which `None` means in the guide."""
    expected = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "max_grad_norm": 1.0, "warmup": 0.01}
    expected |= {"rewarmup": 0.0, "lr_schedule": "cosine", "min_lr_ratio": 0.1, "z_loss_weight": 0.0, "steps_per_eval": 1000}
    assert {name: getattr(PLAIN, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "here"),
    [
        ({"int8": True}, {"quantized_matmul": "int8"}),
        ({"steps_per_export": None}, {"steps_per_export": 100}),
        ({"resources": ResourceConfig.with_tpu("v4-128", slice_count=4)}, {"accelerator_type": "v4-128", "slice_count": 4}),
        ({"resources": TpuPodConfig(tpu_type="v4-128")}, {"accelerator_type": "v4-128"}),
        ({"resources": ResourceConfig.with_tpu("v4-128"), "accelerator_type": "v4-128"}, {"accelerator_type": "v4-128"}),
        ({"cycle_length": [40, 60]}, {"cycle_length": (40, 60)}),
        ({"watch": WatchConfig()}, {}),
        ({"watch": {"interval": 20, "watch_targets": "grads, params"}}, {}),
        ({"watch": WatchConfig(interval=3), "steps_per_log": 3}, {"steps_per_log": 3}),
        ({"watch": WatchConfig(watch_targets=())}, {"watch_norms": False}),
        ({"watch": WatchConfig(include_norms=False, include_per_parameter_norms=False)}, {"watch_norms": False}),
        ({"optimizer_config": MuonConfig(momentum=0.9)}, {"optimizer": "muon", "muon": MuonConfig(momentum=0.9)}),
        ({"optimizer_config": LionConfig(), "optimizer": "lion"}, {"optimizer": "lion"}),
        ({"hf_generation_eos_token_ids": [1, 2]}, {"hf_generation_eos_token_ids": (1, 2)}),
    ],
)
def test_what_is_said_in_another_way_here(given: dict[str, Any], here: dict[str, Any]) -> None:
    assert SimpleTrainConfig(**REQUIRED, **given) == SimpleTrainConfig(**REQUIRED, **here)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer_config": object()}, r"train.optimizer_config=.* is no optimizer of this project: give one of MuonConfig, LionConfig"),
        ({"optimizer_config": LionConfig(), "optimizer": "muon"}, r"train.optimizer_config and train.optimizer='muon' contradict"),
        ({"watch": {"include_histograms": True}}, r"train.watch: include_histograms=True is of no use here: .*train.watch_norms"),
        ({"watch": WatchConfig(split_scan_layers=False)}, r"train.watch: split_scan_layers=False is of no use"),
        ({"watch": WatchConfig(watch_targets=("grads", "opt_state"))}, r"train.watch: opt_state cannot be watched, only grads and params"),
        ({"watch": WatchConfig(interval=15)}, r"train.watch: interval=15 is no multiple of train.steps_per_log: set that to 15 too"),
        ({"watch": WatchConfig(), "watch_norms": False}, r"train.watch and train.watch_norms=False contradict"),
        ({"explicit_mesh_axes": True}, r"train.explicit_mesh_axes=True .*train.data_parallel_size"),
        ({"pad_tokenizer_to_match_model": True}, r"model.vocab_size may be larger than the tokenizer's"),
        ({"steps_per_task_eval": 0}, r"steps_per_task_eval"),
        ({"steps_per_hf_export": 0}, r"train.steps_per_hf_export=0: give .* or -1"),
        ({"steps_per_hf_export": 30, "steps_per_export": 20}, r"train.steps_per_hf_export=30 is no multiple of train.steps_per_export=20"),
        ({"steps_per_hf_export": 20, "steps_per_export": 20, "max_checkpoints": 2}, r"train.max_checkpoints=2 may remove checkpoints"),
        ({"int8": True, "quantized_matmul": "fp8"}, r"train.int8=True and train.quantized_matmul='fp8' contradict"),
        ({"resources": TpuPodConfig(tpu_type="v4-8"), "accelerator_type": "v4-16"}, r"train.resources and train.accelerator_type='v4-16'"),
        ({"resources": "v4-8"}, r"train.resources='v4-8': give ResourceConfig.with_tpu"),
        ({"env_vars": {"WANDB_API_KEY": "1"}}, r"train.env_vars\['WANDB_API_KEY'\] looks like a secret"),
        ({"per_device_eval_parallelism": 0}, r"train.per_device_eval_parallelism=0: give"),
    ],
)
def test_what_has_no_meaning_here_is_refused_with_the_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimpleTrainConfig(**REQUIRED, **given)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, []),
        ({"steps_per_export": 40}, [40, 80]),
        ({"steps_per_export": 50}, [50]),  # the last one is the export step's
        ({"steps_per_export": 20, "steps_per_hf_export": 40}, [40, 80]),
        ({"steps_per_export": 20, "steps_per_hf_export": -1}, []),
        ({"steps_per_export": 20, "max_checkpoints": 1}, []),  # they would be gone
        ({"steps_per_export": 20, "max_checkpoints": 1, "steps_per_hf_export": 100}, []),
    ],
)
def test_which_checkpoints_are_exported_before_the_last(given: dict[str, Any], steps: list[int]) -> None:
    assert list(SimpleTrainConfig(**REQUIRED, **given).hf_export_steps) == steps


def test_a_training_read_back_from_json_is_the_same() -> None:
    changed = SimpleTrainConfig(**REQUIRED, int8=True, resources=ResourceConfig.with_tpu("v4-8"), env_vars={"A": "1"})  # pyright: ignore
    assert SimpleTrainConfig.model_validate_json(changed.model_dump_json()) == changed
    assert SimpleTrainConfig(**{**dict(changed), "seed": 3}).quantized_matmul == "int8"


def test_every_field_has_a_description() -> None:
    assert [name for name, field in SimpleTrainConfig.model_fields.items() if not field.description] == []
