"""DCLM 1B/1x: 28.8 billion tokens on a v4-128, as Marin reproduces it (Li et al. 2024, https://arxiv.org/abs/2406.11794)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages are two directories above this file

from flows.train import SimpleTrainConfig, default_train, executor_main
from model.config import LlamaConfig
from tasks.datasets import dclm_mixture_config_llama3

model_config = LlamaConfig(
    seq_len=2048,
    hidden_dim=2048,
    intermediate_dim=8192,
    num_heads=16,
    num_kv_heads=16,
    num_layers=24,
    use_flash_attention=True,
)

NUM_TRAIN_TOKENS = int(28.8e9)
NUM_TRAIN_STEPS = NUM_TRAIN_TOKENS // (256 * 2048)  # 54,931

train_config = SimpleTrainConfig(
    accelerator_type="v4-128",
    train_batch_size=256,
    num_train_steps=NUM_TRAIN_STEPS,
    learning_rate=3e-3,
    weight_decay=0.033,
    min_lr_ratio=0.1,
    warmup=5000,
    z_loss_weight=1e-4,
)

model = default_train(
    name="dclm_1b_1x",
    tokenized=dclm_mixture_config_llama3,
    model_config=model_config,
    train_config=train_config,
    tags=["HOWTO", "DCLM_1B_1X"],
)

if __name__ == "__main__":
    executor_main(steps=[model], description="Train DCLM 1B/1x.")
