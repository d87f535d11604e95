"""DCLM 7B/1x: 140 billion tokens on four slices of v4-128, as Marin reproduces it (Li et al. 2024)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages are two directories above this file

from flows.train import SimpleTrainConfig, default_train, executor_main
from model.config import LlamaConfig
from tasks.datasets import dclm_mixture_config_llama3

model_config = LlamaConfig(
    seq_len=2048,
    hidden_dim=4096,
    intermediate_dim=11_008,
    num_heads=32,
    num_kv_heads=32,
    num_layers=32,
    use_flash_attention=True,
)

NUM_TRAIN_TOKENS = int(140e9)
NUM_TRAIN_STEPS = NUM_TRAIN_TOKENS // (2048 * 2048)  # 33,378

train_config = SimpleTrainConfig(
    accelerator_type="v4-128",
    slice_count=4,
    train_batch_size=2048,
    num_train_steps=NUM_TRAIN_STEPS,
    learning_rate=2e-3,
    weight_decay=0.05,
    min_lr_ratio=0.1,
    warmup=5000,
    z_loss_weight=5e-6,
)

model = default_train(
    name="dclm_7b_1x",
    tokenized=dclm_mixture_config_llama3,
    model_config=model_config,
    train_config=train_config,
    tags=["DCLM_7B_1X"],
)

if __name__ == "__main__":
    executor_main(steps=[model], description="Train DCLM 7B/1x.")
