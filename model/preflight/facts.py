"""What is asked of the TPU compiler, and what one compilation tells. Both are JSON, so that a child process and a cache can hold them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from model.config import AttentionBackend, LlamaConfig
from model.config_base import Config
from model.preflight.hlo_cost import Phase
from model.preflight.roofline import Roofline
from model.train_config import SimpleTrainConfig


class CompileOrder(Config):
    """One program to compile: the configuration with its remat policy, microbatches and mesh, the slice, the compiler's options."""

    model: LlamaConfig
    train: SimpleTrainConfig
    slice_name: str
    num_slices: int = Field(ge=1)
    compiler_options: dict[str, str]
    program: Literal["train", "evaluation"] = "train"


class CollectiveTotal(Config):
    """All collectives of one kind in a step, on one chip."""

    kind: str
    is_async: bool
    network: Literal["ici", "dcn"]
    times: float = Field(description="On average over steps.")
    wire_bytes: float


class Memory(Config):
    """HBM of one chip in bytes, as `memory_analysis()` of the compiled program declares it."""

    arguments: int
    temporaries: int
    code: int
    assigned: int | None = Field(default=None, description="What the buffer assignment lays out in HBM, where the compiler says so.")

    @property
    def total(self) -> int:
        """What the chip must have; donated arguments are their own outputs."""
        return self.arguments + self.temporaries + self.code


class CompileFacts(Config):
    """A compiled step. Figures are per chip and step unless said otherwise."""

    memory: Memory
    roofline: Roofline
    mesh: dict[str, int]
    attention: AttentionBackend
    collectives: tuple[CollectiveTotal, ...]
    phases: tuple[Phase, ...]
    logits_arrays: int = Field(description="Arrays as large as all logits of a microbatch, of any shape, in the optimised program.")
    compile_cpu_seconds: float = Field(description="Of the compiler alone, all threads.")
    lower_cpu_seconds: float = Field(description="Of tracing and lowering.")
    process_cpu_seconds: float = Field(description="Of the whole child process, imports and analysis included.")
    peak_rss_bytes: int = Field(description="Of the child process.")


class CompileFailure(Config):
    """A step that was not made."""

    kind: Literal["out_of_memory", "refused", "invalid"] = Field(
        description="HBM too small; anything else the compiler objects to; or the step's own code does not take this configuration."
    )
    message: str
    hbm_bytes: int | None = Field(default=None, description="What it would have needed, where the compiler says so.")
    temporaries_only: bool = Field(default=False, description="Whether hbm_bytes leaves out arguments and code: the least it needs.")


class CompileOutcome(Config):
    """Exactly one of the three."""

    facts: CompileFacts | None = None
    evaluation: Memory | None = Field(default=None, description="Of an evaluation, while the whole train state lies in HBM.")
    failure: CompileFailure | None = None

    @property
    def is_final(self) -> bool:
        """Whether another compilation would say the same: no full disk, no lack of memory on this machine can be behind it."""
        memory = self.evaluation if self.facts is None else self.facts.memory
        if memory is not None:
            return memory.assigned is not None
        return self.failure is not None and self.failure.kind == "out_of_memory"
