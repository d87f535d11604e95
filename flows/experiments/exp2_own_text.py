"""Text of your own: put files where SOURCE says, or change it. With OWN_TEXT=DIRECTORY in the environment, that is where they are."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages are two directories above this file

from flows.train import SimpleTrainConfig, default_tokenize, default_train, executor_main
from model.config import LlamaConfig
from tasks.datasets import BytePairTraining, Reading

SOURCE = f"{os.environ.get('OWN_TEXT', 'my_text')}/**/*.txt"

tokenized = default_tokenize(
    name="my_text",
    dataset=SOURCE,
    tokenizer=BytePairTraining(vocab_size=2048),
    format=Reading(document="paragraph", min_document_bytes=2000, holdout=0.05),
)

own_text = default_train(
    name="own_text",
    tokenized=tokenized,
    model_config=LlamaConfig(seq_len=256, hidden_dim=256, intermediate_dim=688, num_heads=8, num_kv_heads=2, num_layers=4),
    train_config=SimpleTrainConfig(train_batch_size=8, num_train_steps=500, learning_rate=3e-3, warmup=0.1, z_loss_weight=1e-4),
)

if __name__ == "__main__":
    executor_main(steps=[own_text], description="Train on text of one's own.")
