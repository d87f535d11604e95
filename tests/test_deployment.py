"""A real Prefect server and real workers on loopback: deploy, run, train on a simulated slice, read the artifacts back through the API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deployments.bare_name import choose
from tasks.presets import Preset
from tests.prefect_server import Prefect, prefect_server
from tests.tpu_pool import Slices, state_names, work_pools

MODEL = {"seq_len": 128, "hidden_dim": 32, "intermediate_dim": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}
PARAMETERS = {"num_train_steps": 6, "train_batch_size": 4, "seed": 7, "model": json.dumps(MODEL)}


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home)) as prefect:
        for pool in ("local", "tpu"):
            prefect.start("worker", "start", "--pool", pool)
        yield prefect


def as_flags(parameters: dict[str, Any]) -> list[str]:
    return [flag for name, value in parameters.items() for flag in ("--param", f"{name}={value}")]


def test_deployed_runs_and_their_artifacts(prefect: Prefect) -> None:
    prefect.run("deployment", "run", "train-llama/tpu", *as_flags(PARAMETERS))
    first = prefect.wait_for_last_run(1)
    assert first["state"]["type"] == "COMPLETED", (prefect.home / "worker.log").read_text()[-5000:]
    artifacts = {artifact["key"]: artifact for artifact in prefect.post("/artifacts/filter") if artifact["key"]}
    assert {
        "plan",
        "train-progress",
        "train-metrics",
        "loss-curve",
        "samples",
        "checkpoint",
        "run-summary",
        "experiment-record",
    } <= artifacts.keys()
    assert float(artifacts["train-progress"]["data"]) == 100.0
    assert '"train/loss"' in artifacts["train-metrics"]["data"]
    assert artifacts["loss-curve"]["data"].startswith("data:image/png;base64,")
    assert "tokens/plays | run | first run of this step" in artifacts["plan"]["data"]
    assert "unigram entropy" in artifacts["run-summary"]["data"]

    # It trained on a slice of two hosts, which is gone.
    (child,) = prefect.flow_runs("pretrain")
    names = state_names(prefect, child)
    assert names[-1] == "Completed", names
    assert "Running" in names
    assert child["parent_task_run_id"] is not None  # shown below the training task
    slices = Slices(prefect.home)
    slices.gone()
    leader, follower = (path.read_text() for path in sorted(slices.directory.glob("pl-*.log")))
    assert "flow-run execute" in leader
    assert "tasks.follower" in follower
    said = [entry["message"] for entry in prefect.post("/logs/filter", logs={"flow_run_id": {"any_": [child["id"]]}})]
    assert any(message.startswith(f"its hosts log to {slices.directory}/pl-") for message in said), said
    assert '"processes": 2' in follower

    # The bare name trains in the run itself. Where it trains is no part of what it is, so nothing runs.
    prefect.run("deployment", "run", "train-llama", *as_flags(PARAMETERS))
    second = prefect.wait_for_last_run(2)
    assert second["state"]["type"] == "COMPLETED"
    assert second["deployment_id"] != first["deployment_id"]
    tasks = prefect.post("/task_runs/filter", task_runs={"flow_run_id": {"any_": [second["id"]]}})
    assert len(tasks) == 8
    assert {task["state"]["name"] for task in tasks} == {"Cached"}


def test_the_form_in_the_ui(prefect: Prefect) -> None:
    deployment = httpx.get(f"{prefect.api}/deployments/name/train-llama/train-llama", timeout=30).json()
    schema = deployment["parameter_openapi_schema"]
    properties = schema["properties"]
    assert all(field.get("description") for field in properties.values())
    assert schema["definitions"]["Preset"]["enum"] == [preset.value for preset in Preset]
    assert properties["num_train_steps"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert schema["definitions"]["LlamaConfig"]["properties"]["num_kv_heads"]["description"]


def test_the_canary_of_the_night_is_there_and_trains_anew(prefect: Prefect) -> None:
    (schedule,) = httpx.get(f"{prefect.api}/deployments/name/train-llama/tpu", timeout=30).json()["schedules"]
    assert not schedule["active"]
    (pattern,) = schedule["parameters"]["force"]
    steps = ("checkpoints/canary", "hf/canary", "tokens/plays", "checkpoints/mine")
    assert [step for step in steps if re.search(pattern, step)] == [*steps[:2]]


def test_how_many_runs_at_once(prefect: Prefect) -> None:
    found = {}
    for name in ("train-llama/train-llama", "train-llama/tpu", "pretrain/tpu", "sweep-tpu/sweep-tpu"):
        deployment = httpx.get(f"{prefect.api}/deployments/name/{name}", timeout=30).json()
        limit, options = deployment["global_concurrency_limit"], deployment["concurrency_options"]
        found[name] = (limit and limit["limit"], options and options["collision_strategy"])
    # A limit of a deployment ends its runs when the server restarts: what trains is limited by its work pool.
    free = dict.fromkeys(("train-llama/train-llama", "train-llama/tpu", "pretrain/tpu"), (None, None))
    assert found == {**free, "sweep-tpu/sweep-tpu": (1, "CANCEL_NEW")}
    prefect.run("work-pool", "set-concurrency-limit", "local", "2")
    assert httpx.get(f"{prefect.api}/work_pools/local", timeout=30).json()["concurrency_limit"] == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("num_train_steps=0", "num_train_steps"),
        ("preset=debgu", "preset"),
        ("learning_rate=-1", "learning_rate"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_starts(prefect: Prefect, flag: str, message: str) -> None:
    before = len(prefect.flow_runs())
    output = prefect.run("deployment", "run", "train-llama/train-llama", "--param", flag, good=False)
    assert message in output
    assert len(prefect.flow_runs()) == before


def test_a_bare_name_that_is_no_flow(prefect: Prefect) -> None:
    assert "no flow 'train-lama' with a deployment" in prefect.run("deployment", "run", "train-lama", good=False)


def test_which_deployment_a_bare_name_is() -> None:
    assert choose("f", {"f/only": []}) == "f/only"
    assert choose("f", {"f/a": [], "f/f": []}) == "f/f"
    assert choose("f", {"f/a": [], "f/b": ["default"]}) == "f/b"
    with pytest.raises(ValueError, match=r"several deployments: f/a, f/b"):
        choose("f", {"f/a": [], "f/b": []})
