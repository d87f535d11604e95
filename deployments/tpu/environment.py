"""What libtpu and JAX find in the environment of a slice's hosts, by generation.

Options of the compiler are not here: `model.preflight` chooses them for each program, and hands them to it, so that what runs is what
was measured. These are of the runtime, which reads them once, when it starts. Over the host's network libtpu finds its place in the
slice by itself, so no TPU_* variable is needed in a container, and its 4 GiB of pinned transfer buffers (TPU_PREMAPPED_BUFFER_SIZE)
are enough for what the trainer moves. https://cloud.google.com/tpu/docs/performance-guide

Where compiled programs are kept is the trainer's to say: with the run, so that the next slice finds them (`model.training_process`).
"""

from __future__ import annotations

from deployments.tpu.host_agent import CACHE_DIRECTORY
from model.slices import Generation
from tasks.places import CACHE_VARIABLE

# Of several slices, joined by the data center network. AXLearn, compiler_options.py: with the default of 4 GiB of pinned memory for it,
# steps of larger models took twice as long; the tracer leaks memory.
SEVERAL_SLICES = {"megascale_grpc_premap_memory_bytes": str(16 * 2**30), "megascale_grpc_enable_xor_tracer": "false"}
# The same source: gradients that several slices of v6e exchange overload PCIe in larger parts.
SEVERAL_SLICES_BY_GENERATION: dict[Generation, dict[str, str]] = {"v6e": {"xla_tpu_iova_dma_chunk_size_bytes": str(2**20)}}


def generation_environment(generation: Generation, num_slices: int) -> dict[str, str]:
    """Environment variables of every host. A chip that does not start is an error that another slice may not have, and no run on CPUs."""
    found = {
        "JAX_PLATFORMS": "tpu,cpu",
        CACHE_VARIABLE: str(CACHE_DIRECTORY),
    }
    if num_slices > 1:
        flags = SEVERAL_SLICES | SEVERAL_SLICES_BY_GENERATION.get(generation, {})
        found["LIBTPU_INIT_ARGS"] = " ".join(f"--{name}={value}" for name, value in flags.items())
    return found
