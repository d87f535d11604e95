"""Which mixture of plays and sonnets is best for both? Three runs; raw files, vocabulary and tokens are made once for all."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages are two directories above this file

from flows.train import (
    SimpleTrainConfig,
    default_tokenize,
    default_train,
    executor_main,
    interpolate_mixture_configs,
    lm_mixture_data_config,
)
from model.config import LlamaConfig
from tasks.datasets import BytePairTraining, Reading
from tasks.experiment_data import TokenizedDataset

tokenizer = BytePairTraining(vocab_size=2048)


def tokenized(name: str, source: str, min_document_bytes: int) -> TokenizedDataset:
    """A tenth of the documents is held out."""
    reading = Reading(document="paragraph", min_document_bytes=min_document_bytes, holdout=0.1)
    return default_tokenize(name, source, tokenizer, reading)


# Mixtures of one name share their vocabulary, and so the tokens.
components = {
    "plays": tokenized("plays", "package:shakespeare/plays/*.txt", 2000),
    "sonnets": tokenized("sonnets", "package:shakespeare/sonnets/*.txt", 500),
}
mostly_plays = lm_mixture_data_config(components, {"plays": 0.95, "sonnets": 0.05}, name="two_sources")
mostly_sonnets = lm_mixture_data_config(components, {"plays": 0.5, "sonnets": 0.5}, name="two_sources")
between = interpolate_mixture_configs([mostly_plays, mostly_sonnets], [0.5, 0.5], name="two_sources")

model_config = LlamaConfig(seq_len=256, hidden_dim=256, intermediate_dim=688, num_heads=8, num_kv_heads=2, num_layers=3)
train_config = SimpleTrainConfig(
    train_batch_size=8, num_train_steps=200, learning_rate=3e-3, warmup=0.1, z_loss_weight=1e-4, compute_dtype="float32"
)

mixtures = {"mostly_plays": mostly_plays, "between": between, "mostly_sonnets": mostly_sonnets}
runs = [
    default_train(name=f"two_sources_{name}", tokenized=mixture, model_config=model_config, train_config=train_config)
    for name, mixture in mixtures.items()
]

if __name__ == "__main__":
    executor_main(steps=runs, description="Compare three mixtures of two sources.")
