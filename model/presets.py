"""Named model shapes, and named jobs: a shape with the batch, schedule and vocabulary it is trained with."""

from __future__ import annotations

from typing import Any

from model.config import LlamaConfig, RopeConfig
from model.config_base import nearest
from model.preflight.settings import Job
from model.train_config import SimpleTrainConfig

LLAMA3_VOCABULARY = 128_256
_LLAMA3_1 = RopeConfig(type="llama3", theta=500_000.0, factor=8.0)


def _shape(seq_len: int, width: int, mlp: int, heads: int, kv_heads: int, layers: int, **others: Any) -> LlamaConfig:
    return LlamaConfig(
        seq_len=seq_len, hidden_dim=width, intermediate_dim=mlp, num_heads=heads, num_kv_heads=kv_heads, num_layers=layers, **others
    )


# Named by their parameters with Llama 3's vocabulary, where not otherwise said. The shapes from 75m to 32b are Marin's
# (experiments/llama.py), 8b and 70b are those of Llama 3 (Meta 2024).
MODELS: dict[str, LlamaConfig] = {
    "debug": _shape(256, 256, 688, 8, 2, 3),  # a minute or two on a laptop: 3 million parameters with a vocabulary of 2,048
    "tiny": _shape(512, 256, 688, 8, 2, 6),  # half an hour on a laptop: 5 million
    "15m": _shape(1024, 128, 448, 2, 2, 4, tie_word_embeddings=True),
    "75m": _shape(1024, 256, 896, 4, 4, 8),
    "150m": _shape(1024, 512, 1792, 8, 8, 6),
    "300m": _shape(1024, 768, 2688, 12, 12, 12),
    "600m": _shape(1024, 1024, 3584, 16, 8, 24),
    "1.4b": _shape(4096, 2048, 7168, 16, 8, 16),
    "1.9b": _shape(4096, 2048, 7168, 16, 8, 24),
    "3.2-1b": _shape(  # Llama 3.2 1B (Meta 2024)
        8192, 2048, 8192, 32, 8, 16, head_dim=64, tie_word_embeddings=True, rope=RopeConfig(type="llama3", theta=500_000.0, factor=32.0)
    ),
    "3.5b": _shape(4096, 2560, 8960, 20, 10, 32),
    "8b": _shape(4096, 4096, 14_336, 32, 8, 32, rope=_LLAMA3_1),
    "13b": _shape(4096, 5120, 13_824, 40, 8, 40, rope=_LLAMA3_1),
    "32b": _shape(4096, 5120, 27_648, 40, 8, 64, rope=_LLAMA3_1),
    "70b": _shape(4096, 8192, 28_672, 64, 8, 80, rope=_LLAMA3_1),
    # the baselines of DataComp-LM (Li et al. 2024) as Marin trains them
    "dclm-1b": _shape(2048, 2048, 8192, 16, 16, 24),
    "dclm-7b": _shape(2048, 4096, 11_008, 32, 32, 32),
}


def _job(name: str, batch_size: int, steps: int, learning_rate: float, vocab_size: int = LLAMA3_VOCABULARY, **others: Any) -> Job:
    given = {"z_loss_weight": 1e-4, **others}
    train = SimpleTrainConfig(train_batch_size=batch_size, num_train_steps=steps, learning_rate=learning_rate, **given)
    return Job(name=name, model=MODELS[name].with_vocab(vocab_size), train=train)


_DCLM = {"min_lr_ratio": 0.1, "warmup": 5000}
# 150m, 300m, 1.4b and 8b as Marin trains them, 32b with the learning rate and clipping of its 32B; the others see about 20 tokens
# a parameter at a learning rate between those of their neighbours.
JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        _job("debug", 64, 240, 3e-3, 2048),
        _job("tiny", 64, 600, 2e-3, 2048),
        _job("15m", 128, 2_700, 3e-3),
        _job("75m", 256, 5_700, 3e-3),
        _job("150m", 512, 20_000, 3e-3),
        _job("300m", 1024, 18_000, 3e-3),
        _job("600m", 1024, 12_000, 1e-3),
        _job("1.4b", 1024, 10_000, 3e-4),
        _job("1.9b", 1024, 10_000, 3e-4),
        _job("3.2-1b", 256, 50_000, 1e-3),
        _job("3.5b", 1024, 17_000, 3e-4),
        _job("8b", 1024, 40_000, 2e-3, weight_decay=0.05),
        _job("13b", 1024, 62_000, 3e-4, weight_decay=0.05),
        _job("32b", 2048, 76_000, 7e-4, weight_decay=0.05, max_grad_norm=0.2),
        _job("70b", 2048, 168_000, 1.5e-4),
        _job("dclm-1b", 256, 54_931, 3e-3, weight_decay=0.033, **_DCLM),
        _job("dclm-7b", 2048, 33_378, 2e-3, weight_decay=0.05, **{**_DCLM, "z_loss_weight": 5e-6}),
    )
}
# The slices that a preset asks for, and how many of them.
SLICES: dict[str, tuple[str, int]] = {
    "15m": ("v4-8", 1),
    "75m": ("v4-8", 1),
    "150m": ("v4-32", 1),
    "300m": ("v4-64", 1),
    "600m": ("v4-64", 1),
    "1.4b": ("v4-128", 1),
    "1.9b": ("v4-128", 1),
    "3.2-1b": ("v4-128", 1),
    "3.5b": ("v4-256", 1),
    "8b": ("v4-128", 4),
    "13b": ("v4-512", 1),
    "32b": ("v4-1024", 1),
    "70b": ("v4-2048", 1),
    "dclm-1b": ("v4-128", 1),
    "dclm-7b": ("v4-128", 4),
}
_OTHER_NAMES = {"r1": "dclm-1b", "r7": "dclm-7b", "dclm-1b-1x": "dclm-1b", "dclm-7b-1x": "dclm-7b"}


def job_named(name: str) -> Job:
    """A job of `JOBS`; "R1" and "dclm-1b-1x" are other names of "dclm-1b", the same for 7b; case does not matter.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    wanted = name.strip().lower()
    wanted = _OTHER_NAMES.get(wanted, wanted)
    if wanted not in JOBS:
        raise ValueError(f"unknown job {name!r}{nearest(wanted, list(JOBS))}; the jobs are {', '.join(JOBS)}")
    return JOBS[wanted]
