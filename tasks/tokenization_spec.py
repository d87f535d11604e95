"""What the tokenizing process is told: one JSON file, written by the step."""

from __future__ import annotations

from model.config_base import Config
from tasks.data_steps import RegisteredTask
from tasks.datasets import Reading


class ShardJob(Config):
    """One shard to write. `key` identifies its input and how it is read: equal key, equal output."""

    split: str
    shard: int
    of: int
    key: str


class TokenizationSpec(Config):
    """A token store to write, from text files as `jobs` say, or from all shards of a registered SeqIO task."""

    store: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    key: str
    files: tuple[str, ...] = ()
    reading: Reading = Reading()
    jobs: tuple[ShardJob, ...] = ()
    registered: RegisteredTask | None = None
