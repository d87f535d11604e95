"""What the process that tokenizes through SeqIO is told: one JSON file, written by the step."""

from __future__ import annotations

from pydantic import model_validator

from model.config_base import Config
from tasks.data_steps import RegisteredTask, TfdsTask


class TokenizationSpec(Config):
    """A token store to write from all shards of a registered SeqIO task, or of a TFDS dataset."""

    store: str
    tokenizer: str
    key: str
    registered: RegisteredTask | None = None
    tfds: TfdsTask | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> TokenizationSpec:
        if (self.registered is None) == (self.tfds is None):
            raise ValueError(f"registered={self.registered} and tfds={self.tfds}: a store is made from one of the two; set that one alone")
        return self
