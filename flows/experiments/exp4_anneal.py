"""Pretrain on everything, then go on with the sonnets alone while the learning rate falls to nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages are two directories above this file

from flows.train import SimpleTrainConfig, anneal_after, default_train, executor_main
from model.config import LlamaConfig
from tasks.datasets import shakespeare_mixture

mixture = shakespeare_mixture()
model_config = LlamaConfig(seq_len=256, hidden_dim=256, intermediate_dim=688, num_heads=8, num_kv_heads=2, num_layers=3)

pretrained = default_train(
    name="anneal_base",
    tokenized=mixture,
    model_config=model_config,
    train_config=SimpleTrainConfig(
        train_batch_size=8, num_train_steps=200, learning_rate=3e-3, warmup=0.1, lr_schedule="constant", compute_dtype="float32"
    ),
)

# The vocabulary is that of the base: it is trained on the same text, whatever the shares are.
annealed = anneal_after(
    name="anneal_sonnets",
    base=pretrained,
    dataset_config=mixture.model_copy(update={"weights": {"plays": 0.2, "sonnets": 0.8}}),
    num_anneal_training_tokens=80 * 8 * 256,
    train_batch_size=8,
    learning_rate=3e-3,
    train={"compute_dtype": "float32", "steps_per_eval": 40},
)

if __name__ == "__main__":
    executor_main(steps=[pretrained, annealed], description="Pretrain, then anneal.")
