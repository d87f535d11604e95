"""A minute or two on a laptop, offline: 3 million parameters on the packaged plays and sonnets."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages are two directories above this file

from flows.train import SimpleTrainConfig, default_train, executor_main
from model.config import LlamaConfig
from tasks.datasets import shakespeare_mixture

model_config = LlamaConfig(seq_len=256, hidden_dim=256, intermediate_dim=688, num_heads=8, num_kv_heads=2, num_layers=3)

train_config = SimpleTrainConfig(
    train_batch_size=8,
    num_train_steps=240,
    learning_rate=3e-3,
    warmup=0.1,
    z_loss_weight=1e-4,
    compute_dtype="float32",
    steps_per_eval=80,
    steps_per_export=80,
    steps_per_hf_export=-1,
    sample_prompts=("HAM.\nTo be, or not", "Enter the King"),
)

tiny_cpu = default_train(
    name="tiny_cpu",
    tokenized=shakespeare_mixture(),
    model_config=model_config,
    train_config=train_config,
)

if __name__ == "__main__":
    executor_main(steps=[tiny_cpu], description="Train a tiny model on the CPU.")
