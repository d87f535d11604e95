"""Where and how wide tokenization runs. Plain configuration; nothing in it changes a byte of the result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from model.config_base import Config, runtime


class TokenizeConfig(Config):
    """The task runner that tokenizes shards, and the encoder."""

    runner: Literal["threads", "processes", "dask"] = runtime(
        "threads", description="Threads (the encoders release Python's lock), processes of this machine, or a Dask cluster."
    )
    workers: int | None = Field(
        default=None, ge=1, le=4096, json_schema_extra={"runtime": True}, description="Shards at a time. Unset: the cores of this machine."
    )
    dask_address: str | None = runtime(None, description="The scheduler of a running Dask cluster. Unset: a cluster on this machine.")
    accelerator: Literal["auto", "none"] = runtime(
        "auto", description="Use gigatoken where it is installed, checked against the reference encoder; or the reference alone."
    )
    tries: int = Field(
        default=3, ge=1, le=10, json_schema_extra={"runtime": True}, description="Attempts at a shard whose disk or worker failed."
    )

    @model_validator(mode="after")
    def _check(self) -> TokenizeConfig:
        if self.dask_address is not None and self.runner != "dask":
            raise ValueError(f"tokenize.dask_address={self.dask_address!r} with tokenize.runner={self.runner!r}: set the runner to 'dask'")
        return self
