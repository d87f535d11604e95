"""`python -m model.preflight` as a person and a program meet it, with steps of two narrow layers that libtpu compiles now."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.preflight.compile_step import failure_of
from model.preflight.result import Preflight

CHECKOUT = Path(__file__).resolve().parent.parent
NARROW = (
    *("--model.hidden-dim", "512", "--model.intermediate-dim", "1024", "--model.num-heads", "4", "--model.num-kv-heads", "4"),
    *("--model.num-layers", "2", "--model.vocab-size", "8192", "--seq-len", "512"),
)
# One compilation each, some 15 CPU-seconds; the widths of the reference jobs are in test_preflight_bars.py.
COMPILED = {
    "v4-128": (
        *("R1", "--accelerator", "v4-128", "--batch", "256", "--remat", "save_all", "--microbatches", "2"),
        *("--model.cross-entropy-block-size", "256"),  # a quarter of the tokens that a chip has at once
    ),
    # With all 1,024 tokens of a chip in one block of the loss.
    "two slices": ("r7", "--accelerator", "v4-128", "--num-slices", "2", "--batch", "256"),
    "v5p-32": ("R7", "--accelerator", "v5p-32", "--batch", "8", "--train.context-parallel-size", "2"),
    "v6e-16": ("R7", "--accelerator", "v6e-16", "--batch", "64", "--remat", "full", "--microbatches", "2"),
    "v5e-16": ("R1", "--accelerator", "v5e-16", "--batch", "16"),
}


@dataclasses.dataclass
class Command:
    """Runs the command with a cache of its own."""

    cache: Path

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = (
            os.environ
            | {"PYTHONPATH": str(CHECKOUT), "PREFECT_LLAMA_CACHE": str(self.cache), "COLUMNS": "200", "XLA_FLAGS": ""}
            | environment
        )
        command = [sys.executable, "-m", "model.preflight", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=self.cache, timeout=500)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("cache"))


class Compiled(dict[str, subprocess.CompletedProcess[str]]):
    """Each of COMPILED, compiled when a test first asks for it."""

    def __init__(self, command: Command) -> None:
        super().__init__()
        self._command = command

    def __missing__(self, name: str) -> subprocess.CompletedProcess[str]:
        self[name] = self._command(*COMPILED[name], *NARROW, "--no-search", "--json")
        return self[name]


@pytest.fixture(scope="module")
def compiled(command: Command) -> Compiled:
    pytest.importorskip("libtpu")
    return Compiled(command)


def found(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON, which is all there is on standard output."""
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


def test_json_alone_on_standard_output_and_progress_beside_it(compiled: Compiled) -> None:
    done = compiled["v4-128"]
    assert done.returncode == 0, done.stderr
    Preflight.model_validate_json(done.stdout)
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr  # the compiler's own noise is not there
    assert all(line.startswith("compile 1: ") for line in lines)


def test_one_slice_with_microbatches(compiled: Compiled) -> None:
    one = found(compiled["v4-128"])
    assert one["fits"]
    assert (one["remat"], one["microbatches"], one["gradient_sum_dtype"], one["attention"]) == ("save_all", 2, "bfloat16", "splash")
    assert one["mesh"] == {"data": 1, "fsdp": 16, "fsdp_ring": 4, "context": 1, "tensor": 1}
    assert "xla_tpu_reduce_scatter_collective_matmul_mode" in one["compiler_options"]
    assert 0 < one["hbm_assigned_gib_per_chip"] <= one["hbm_gib_per_chip"] < 1
    assert 0 < one["mfu_bound_exposed"] <= one["mfu_bound_hidden"] < 1
    assert one["mfu_bound_exposed"] < one["mfu_bound_exposed_full_attention"]
    assert one["step_seconds"] >= one["on_chip_seconds"] >= max(one["compute_seconds"], one["hbm_seconds"])
    # gathered in the forward and the backward pass of each microbatch, scattered once: three times the bfloat16 weights of both
    weights = 2 * (2 * (4 * 512 * 512 + 3 * 512 * 1024) + 2 * 8192 * 512)
    assert one["ici_bytes_per_chip"] == pytest.approx(2 * 2.5 * weights, rel=0.35)
    assert one["dcn_bytes_per_chip"] == 0
    assert one["all_gather_async_share"] > 0.4
    assert 0 < one["lower_cpu_seconds"] < one["compile_cpu_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chips", "mesh", "usable"),
    [
        ("v5p-32", 16, {"data": 1, "fsdp": 8, "fsdp_ring": 1, "context": 2, "tensor": 1}, 95.7),
        ("v6e-16", 16, {"data": 1, "fsdp": 16, "fsdp_ring": 1, "context": 1, "tensor": 1}, 31.2),
    ],
)
def test_other_generations(compiled: Compiled, name: str, chips: int, mesh: dict[str, int], usable: float) -> None:
    one = found(compiled[name])
    assert (one["job"], one["num_chips"], one["mesh"], one["attention"]) == ("dclm-7b", chips, mesh, "splash")
    assert one["fits"]
    assert one["hbm_usable_gib"] == pytest.approx(usable, abs=0.1)
    assert one["bound"] in ("compute", "hbm", "ici")
    assert one["ici_bytes_per_chip"] > 0 == one["dcn_bytes_per_chip"]
    assert 0 < one["mfu_bound_exposed"] <= one["mfu_bound_hidden"] < 1


def test_weight_gradients_are_scattered_over_the_plane_and_then_over_the_ring(
    compiled: Compiled,
) -> None:
    totals = found(compiled["v4-128"])["collectives"]
    times = {kind: sum(one["times"] for one in totals if one["kind"] == kind) for kind in ("collective-permute", "reduce-scatter")}
    products = 7 * 2 * 2  # weights, layers, microbatches
    # While a product is computed its partial sums go round the plane of 16 chips; round all 64 they would take 63 steps.
    assert products * 15 <= times["collective-permute"] < products * 30
    assert times["reduce-scatter"] >= 7  # over the ring that is left: no such instruction where one stage is all
    summed_everywhere = sum(one["wire_bytes"] for one in totals if one["kind"] == "all-reduce")
    assert summed_everywhere < 0.01 * sum(one["wire_bytes"] for one in totals)


def test_whole_logits_are_found_where_the_loss_has_one_block_and_only_there(
    compiled: Compiled,
) -> None:
    assert found(compiled["v4-128"])["logits_arrays"] == 0
    assert found(compiled["two slices"])["logits_arrays"] > 0


def test_slices_exchange_gradients_only(compiled: Compiled) -> None:
    two = found(compiled["two slices"])
    assert (two["job"], two["num_slices"], two["num_chips"], two["mesh"]["data"]) == ("dclm-7b", 2, 128, 2)
    parameters = 2 * (4 * 512 * 512 + 3 * 512 * 1024) + 2 * 8192 * 512
    assert two["dcn_bytes_per_chip"] == pytest.approx(parameters / 64 * 2, rel=0.6)  # a 64th each, in two bytes, or four of the head's
    assert two["dcn_seconds"] > 0


def test_traffic_inside_several_slices_is_that_of_a_torus(compiled: Compiled) -> None:
    one, two = found(compiled["v4-128"]), found(compiled["two slices"])
    assert two["ici_bytes_per_chip"] == pytest.approx(one["ici_bytes_per_chip"] / 2, rel=0.1)  # one has two microbatches
    inside = {
        kind: sum(total["wire_bytes"] for total in two["collectives"] if (total["network"], total["kind"]) == ("ici", kind))
        for kind in ("all-gather", "all-reduce")
    }
    assert inside["all-gather"] > 10 * inside["all-reduce"] > 0
    assert two["all_gather_async_share"] > 0.4
    assert any("one slice with its share of the batch" in note for note in two["notes"])


def test_a_plane(compiled: Compiled) -> None:
    plane = found(compiled["v5e-16"])
    assert (plane["accelerator"], plane["remat"], plane["microbatches"]) == ("v5litepod-16", "full", 1)
    assert plane["recomputation"] > 1.2
    assert any("v5e chips is" in line for line in plane["advice"])


def test_the_second_time_nothing_is_compiled(command: Command, compiled: Compiled) -> None:
    first = found(compiled["v5e-16"])
    again = command(*COMPILED["v5e-16"], *NARROW, "--no-search", "--json")
    assert again.stderr == ""
    second = found(again)
    assert second["trials"][0]["from_cache"]
    assert {**second, "trials": None} == {**first, "trials": None}


def test_the_report_for_people(command: Command, compiled: Compiled, tmp_path: Path) -> None:
    picture = tmp_path / "roofline.png"
    done = command(*COMPILED["v4-128"], *NARROW, "--no-search", "--plot", str(picture), "--price", "spot")
    assert done.returncode == 0, done.stderr
    for words in (
        "dclm-1b on v4-128 (64 chips, 16 hosts): fits",
        "fsdp 16 x fsdp_ring 4",
        "save_all",
        "reduce-scatter-matmul",
        "xla_tpu_reduce_scatter_collective_matmul_mode=post_spmd",
        "of 30.75 GiB",
        "MFU bound",
        "TFLOP/s of one chip over FLOP per byte of HBM",
        "spot list price in us-central2 as of 20",
        "gradients are summed over chips in bfloat16",
    ):
        assert words in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_job_from_a_file(command: Command, compiled: Compiled, tmp_path: Path) -> None:
    model = {"seq_len": 512, "hidden_dim": 512, "intermediate_dim": 1024, "num_heads": 4, "num_kv_heads": 4, "num_layers": 2}
    model |= {"vocab_size": 8192}
    train = {"train_batch_size": 16, "num_train_steps": 10, "learning_rate": 1.0, "accelerator_type": "v5e-16", "warmup": 5000 / 54_931}
    train |= {"weight_decay": 0.033, "min_lr_ratio": 0.1, "z_loss_weight": 1e-4, "train_seq_len": 512}
    job = tmp_path / "job.json"
    model["seq_len"] = 2048  # a longer model trained on sequences of 512 is the same step
    job.write_text(json.dumps({"name": "mine", "model": model, "train": train}))
    done = command("--job", str(job), "--no-search", "--json")
    assert found(done)["job"] == "mine"
    assert found(done)["trials"][0]["from_cache"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["R1"], "on which slice? give --accelerator"),
        ([], "which job?"),
        (["R2", "--accelerator", "v4-128"], "unknown job 'R2'"),
        (["dclm-8b", "--accelerator", "v4-128"], "did you mean 'dclm-"),
        (["R1", "--accelerator", "v4-100"], "unknown TPU slice 'v4-100': did you mean v4-16, v4-32, v4-64, v4-128?"),
        (["R1", "--accelerator", "v4-128", "--batch", "255"], "use a multiple of 64, such as 192"),
        (["R1", "--accelerator", "v4-128", "--microbatches", "3"], "use one of 1, 2, 4"),
        (["R1", "--accelerator", "v4-8", "--microbatches", "0"], "--microbatches=0: the batch is computed in 1 part or more"),
        (
            ["R1", "--accelerator", "v4-8", "--microbatches", "-1", "--no-search"],
            "--microbatches=-1: the batch is computed in 1 part or more",
        ),
        (
            ["R1", "--accelerator", "v4-8", "--no-search", "--train.context-parallel-size", "16"],
            "train.context_parallel_size=16 x train.tensor_parallel_size=1 does not divide the 4 device(s)",
        ),
        (["R1", "--accelerator", "v4-128", "--no-search", "--train.tensor-parallel-size", "32"], "num_heads=16 is not a multiple"),
        (["R1", "--accelerator", "v4-8", "--plot", "/nowhere/roofline.png"], "--plot /nowhere/roofline.png cannot be written"),
        (["R1", "--accelerator", "v4-8", "--plot", "/"], "--plot / is a directory"),
        (["R1", "--accelerator", "v4-128", "--remat", "everything"], "save_attn"),
        (
            ["R1", "--accelerator", "v4-128", "--train.tensor-parallel-size", "32"],
            "num_heads=16 is not a multiple of the mesh axis tensor=32",
        ),
        (["R1", "--accelerator", "v4-128", "--num-slices", "0"], "greater than or equal to 1"),
        (["R1", "--accelerator", "v4-128", "--price", "free"], "on_demand"),
        (["--job"], "--job needs a file"),
        (["--job", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_mistakes_are_answered_before_anything_is_compiled(command: Command, arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2, done.stdout
    assert done.stdout == "" or "usage" in done.stdout
    said = " ".join((done.stdout + done.stderr).replace("\u2502", " ").split())
    assert message in said
    assert "Traceback" not in said
    assert "compile 1" not in said


def test_a_job_that_does_not_fit(command: Command) -> None:
    pytest.importorskip("libtpu")
    arguments = ("R1", *NARROW, "--accelerator", "v5e-1", "--batch", "2048", "--remat", "none", "--microbatches", "1")
    done = command(*arguments, "--no-search", "--json")
    assert done.returncode == 3, done.stderr
    refused = json.loads(done.stdout)
    assert not refused["fits"]
    assert refused["hbm_gib_per_chip"] > 15.75 == refused["hbm_usable_gib"]
    assert refused["hbm_is_least"]
    assert refused["step_seconds"] is None
    assert "Ran out of memory" in refused["trials"][0]["failure"]
    setting = next(line for line in refused["advice"] if line.startswith("by estimate it would fit with --remat"))
    advised = re.search(r"--microbatches (\d+)", setting)
    assert advised is not None
    assert int(advised.group(1)) > 1
    people = command(*arguments, "--no-search")
    assert people.returncode == 3
    assert "does NOT fit, at least " in people.stdout
    assert "advice: by estimate it would fit with" in people.stdout


@pytest.mark.parametrize(
    ("message", "kind", "gib", "least"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 34.19G of 30.75G hbm. Exceeded", "out_of_memory", 34.19, False),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total (68.29G) exceeds available HBM (15.75G).", "out_of_memory", 68.29, True),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.\nUsed 16.12M of 16.00M vmem.", "refused", None, False),
        ("INVALID_ARGUMENT: No such compile option: 'xla_tpu_make_it_fast'", "refused", None, False),
    ],
)
def test_what_the_compiler_says_is_understood(message: str, kind: str, gib: float | None, least: bool) -> None:
    failure = failure_of(message)
    assert (failure.kind, failure.temporaries_only) == (kind, least)
    assert (failure.hbm_bytes and failure.hbm_bytes / 2**30) == pytest.approx(gib)


def test_help_needs_no_job_and_loads_no_jax(command: Command) -> None:
    done = command("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "--no-search" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"jax", "libtpu", "matplotlib", "plotext"}
