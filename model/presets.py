"""Named model shapes, and named jobs: a shape with the batch, schedule and vocabulary it is trained with."""

from __future__ import annotations

from model.config import LlamaConfig, RopeConfig
from model.config_base import nearest
from model.preflight.settings import Job
from model.train_config import SimpleTrainConfig

MODELS: dict[str, LlamaConfig] = {
    # A minute or two on a laptop: 3 million parameters with a vocabulary of 2,048.
    "debug": LlamaConfig(seq_len=256, hidden_dim=256, intermediate_dim=688, num_layers=3, num_heads=8, num_kv_heads=2),
    # Half an hour on a laptop: 5 million parameters.
    "tiny": LlamaConfig(seq_len=512, hidden_dim=256, intermediate_dim=688, num_layers=6, num_heads=8, num_kv_heads=2),
    # Llama 3.2 1B (Meta 2024).
    "3.2-1b": LlamaConfig(
        seq_len=8192,
        hidden_dim=2048,
        intermediate_dim=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        rope=RopeConfig(type="llama3", theta=500_000.0, factor=32.0),
    ),
}

LLAMA3_VOCABULARY = 128_256


def _shape(name: str, vocab_size: int, batch_size: int, steps: int, learning_rate: float) -> Job:
    train = SimpleTrainConfig(train_batch_size=batch_size, num_train_steps=steps, learning_rate=learning_rate, z_loss_weight=1e-4)
    return Job(name=name, model=MODELS[name].with_vocab(vocab_size), train=train)


JOBS: dict[str, Job] = {
    # The baselines of DataComp-LM (Li et al. 2024) as Marin trains them, here with Llama 3's vocabulary.
    "dclm-1b": Job(
        name="dclm-1b",
        model=LlamaConfig(
            seq_len=2048,
            hidden_dim=2048,
            intermediate_dim=8192,
            num_heads=16,
            num_kv_heads=16,
            num_layers=24,
            vocab_size=LLAMA3_VOCABULARY,
        ),
        train=SimpleTrainConfig(
            train_batch_size=256,
            num_train_steps=54_931,
            learning_rate=3e-3,
            weight_decay=0.033,
            min_lr_ratio=0.1,
            warmup=5000,
            z_loss_weight=1e-4,
        ),
    ),
    "dclm-7b": Job(
        name="dclm-7b",
        model=LlamaConfig(
            seq_len=2048,
            hidden_dim=4096,
            intermediate_dim=11_008,
            num_heads=32,
            num_kv_heads=32,
            num_layers=32,
            vocab_size=LLAMA3_VOCABULARY,
        ),
        train=SimpleTrainConfig(
            train_batch_size=2048,
            num_train_steps=33_379,  # 140 billion tokens
            learning_rate=2e-3,
            weight_decay=0.05,
            min_lr_ratio=0.1,
            warmup=5000,
            z_loss_weight=1e-4,
        ),
    ),
    "3.2-1b": _shape("3.2-1b", LLAMA3_VOCABULARY, batch_size=256, steps=50_000, learning_rate=1e-3),
    "tiny": _shape("tiny", 2048, batch_size=64, steps=600, learning_rate=2e-3),
    "debug": _shape("debug", 2048, batch_size=64, steps=240, learning_rate=3e-3),
}
_SHORT = {"r1": "dclm-1b", "r7": "dclm-7b"}


def job_named(name: str) -> Job:
    """A job of `JOBS`; "R1" and "R7" stand for "dclm-1b" and "dclm-7b", and case does not matter.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    wanted = name.strip().lower()
    wanted = _SHORT.get(wanted, wanted)
    if wanted not in JOBS:
        raise ValueError(f"unknown job {name!r}{nearest(wanted, list(JOBS))}; the jobs are {', '.join(JOBS)}")
    return JOBS[wanted]
