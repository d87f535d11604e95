"""Six arms of a tiny model on the CPU: three learning rates, each with two weight decays. `--plan` says what they amount to."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages are two directories above this file

from flows.sweep_command import sweep_main
from model.config import LlamaConfig
from model.train_config import SimpleTrainConfig
from tasks.datasets import shakespeare_mixture
from tasks.experiment import default_train
from tasks.sweep_config import Sweep

model_config = LlamaConfig(seq_len=128, hidden_dim=128, intermediate_dim=344, num_heads=4, num_kv_heads=2, num_layers=3)

train_config = SimpleTrainConfig(
    train_batch_size=8,
    num_train_steps=200,
    learning_rate=3e-3,
    weight_decay=0.1,
    warmup=0.1,
    z_loss_weight=1e-4,
    compute_dtype="float32",
    steps_per_eval=100,
    steps_per_export=50,
    steps_per_hf_export=-1,
    max_checkpoints=1,
)

base = default_train(name="rates", tokenized=shakespeare_mixture(), model_config=model_config, train_config=train_config)

# The arm with a learning rate of 0.003 and a weight decay of 0.1 is `base` itself, and is named as it is.
sweep = Sweep(base=base, grid={"train.learning_rate": (1e-3, 3e-3, 1e-2), "train.weight_decay": (0.1, 0.01)})

if __name__ == "__main__":
    sweep_main(sweep, description="Which learning rate and weight decay suit a tiny model.")
