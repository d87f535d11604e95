"""What hosts of a slice find in their environment, and where they log."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, get_args
from uuid import UUID

import pytest

from deployments.tpu.environment import generation_environment
from deployments.tpu.host_agent import CACHE_DIRECTORY
from deployments.tpu.request import SliceName, bucket_root, host_environment, log_directory
from deployments.tpu.smoke import Broken, libtpu
from deployments.tpu.worker import where_hosts_log
from model.preflight.compiler_flags import ASYNC_ALL_GATHER, REDUCE_SCATTER_MATMUL, WHOLE_PRODUCTS
from model.slices import Generation
from tests.test_tpu_form import cloud

NAME = SliceName(UUID("12345678-1234-5678-1234-567812345678"), 3)
JOB = {"directory": "/cache/gs/bucket/my/root/checkpoints/debug-0123", "bucket": "gs://bucket/my/root/checkpoints/debug-0123"}


def flags(environment: dict[str, str]) -> dict[str, str]:
    given = environment.get("LIBTPU_INIT_ARGS", "").split()
    assert all(flag.startswith("--") for flag in given)
    return dict(flag.removeprefix("--").split("=", 1) for flag in given)


@pytest.mark.parametrize("generation", get_args(Generation))
def test_by_generation(generation: Generation) -> None:
    one, several = generation_environment(generation, 1), generation_environment(generation, 2)
    assert one == {"JAX_PLATFORMS": "tpu,cpu", "PREFECT_LLAMA_CACHE": str(CACHE_DIRECTORY)}
    assert several.keys() - one.keys() == {"LIBTPU_INIT_ARGS"}
    assert flags(several)["megascale_grpc_premap_memory_bytes"] == "17179869184"
    assert ("xla_tpu_iova_dma_chunk_size_bytes" in flags(several)) == (generation == "v6e")


def test_no_option_of_the_compiler_is_told_twice() -> None:
    chosen = {name for each in (ASYNC_ALL_GATHER, REDUCE_SCATTER_MATMUL, WHOLE_PRODUCTS) for name in each.options}
    assert not chosen & {name for generation in get_args(Generation) for name in flags(generation_environment(generation, 2))}


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64")
def test_libtpu_knows_every_flag() -> None:
    assert "32 chips" in libtpu(generation_environment("v6e", 2)["LIBTPU_INIT_ARGS"])
    with pytest.raises(Broken, match="no_such_flag"):
        libtpu("--no_such_flag=1")


def test_what_a_person_sets_prevails() -> None:
    configuration = cloud(
        num_slices=2, env={"LIBTPU_INIT_ARGS": "--mine=1", "JAX_COMPILATION_CACHE_DIR": "/mine", "OWN": "x", "NONE": None}
    )
    assert host_environment(configuration) == {
        "JAX_PLATFORMS": "tpu,cpu",
        "PREFECT_LLAMA_CACHE": str(CACHE_DIRECTORY),
        "LIBTPU_INIT_ARGS": "--mine=1",
        "JAX_COMPILATION_CACHE_DIR": "/mine",
        "OWN": "x",
    }


def test_simulated_hosts_are_told_nothing_of_tpus() -> None:
    assert host_environment(cloud(provider="local", env={"OWN": "x"})) == {"OWN": "x"}


@pytest.mark.parametrize(
    ("job", "root"),
    [
        (JOB, "gs://bucket/my/root"),
        ({"bucket": "gs://bucket/checkpoints/debug-0123"}, "gs://bucket"),
        ({"directory": "/disk/checkpoints/debug-0123", "bucket": None}, None),
        ({}, None),
    ],
)
def test_the_root_of_a_job(job: dict[str, Any], root: str | None) -> None:
    assert bucket_root(job) == root


def test_where_hosts_log() -> None:
    logs = log_directory(cloud(), {"job": JOB}, NAME)
    assert logs == f"gs://bucket/my/root/logs/{NAME.flow_run}/3"
    said = where_hosts_log(cloud(), str(NAME), logs)
    assert said.startswith(f"{logs}/host-N.log, https://console.cloud.google.com/storage/browser/bucket/my/root/logs/")
    assert "which goes with it" in where_hosts_log(cloud(), str(NAME), log_directory(cloud(), {"job": {}}, NAME))
    local = cloud(provider="local")
    assert log_directory(local, {"job": JOB}, NAME) is None
    assert where_hosts_log(local, str(NAME), None).endswith(f"/tpu-emulator/{NAME}*.log")
