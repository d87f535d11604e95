"""The form of a tpu work pool: what it refuses, what it derives, and what of it reaches Cloud TPU."""

from __future__ import annotations

import asyncio
import datetime
import json
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import State, StateType
from pydantic import ValidationError

from deployments.tpu.cloud import queued_resource
from deployments.tpu.form import TPUJobConfiguration
from deployments.tpu.host_agent import LAUNCH
from deployments.tpu.request import SliceName, label, labels, metadata
from deployments.tpu.seen import limits_of, spent_seconds
from deployments.tpu.worker import TPUWorker
from model.slices import SLICES

RUN = UUID("12345678-1234-5678-1234-567812345678")
CLOUD = {
    "provider": "cloud",
    "project": "mine",
    "zones": ["us-central2-b", "us-east5-a"],
    "image": "registry/image@sha256:0",
    "accelerator_type": "v4-128",
}


def cloud(**changed: Any) -> TPUJobConfiguration:
    return TPUJobConfiguration(**{**CLOUD, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"accelerator_type": "v4-127"}, "unknown TPU slice 'v4-127': did you mean v4-"),
        ({"zones": ["us-central2"]}, "'us-central2' is no zone: write it like us-central2-b"),
        ({"project": None}, "provider='cloud' needs project: set"),
        ({"zones": []}, "provider='cloud' needs zones: set"),
        ({"image": None}, "needs image, or repository and revision"),
        ({"provisioning": "reserved"}, "reservation=None: a reservation goes with 'reserved' only"),
        ({"reservation": "r"}, "provisioning='spot' and reservation='r'"),
        ({"provisioning": "flex-start"}, "choose 'spot', 'on-demand' or 'reserved'"),
        ({"max_cost": -1}, "greater than 0"),
        ({"env": {"WANDB_API_KEY": "canary"}}, "env names WANDB_API_KEY: job variables are stored in clear"),
        ({"env": {"PREFECT_API_AUTH_STRING": "canary"}}, "env names PREFECT_API_AUTH_STRING"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "canary", "MY_PASSWD": "canary"}}, "env names AWS_SECRET_ACCESS_KEY, MY_PASSWD"),
    ],
)
def test_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("(", r"\(")) as refused:
        cloud(**changed)
    assert "canary" not in str(refused.value)


def test_what_only_sounds_like_a_secret_is_taken() -> None:
    env = {"TOKENIZERS_PARALLELISM": "false", "AUTHOR": "me", "MONKEY": "1"}
    assert cloud(env=env).env == env


@pytest.mark.parametrize("place", ["the pool", "the deployment"])
def test_a_prefect_block_is_refused_wherever_it_is_named(place: str) -> None:
    template = TPUWorker.get_default_base_job_template()
    env = {"OPENING": "{{ prefect.blocks.secret.canary }}"}
    if place == "the pool":
        template["variables"]["properties"]["env"]["default"] = env
    values = {} if place == "the pool" else {"env": env}
    with pytest.raises(ValueError, match=r"name the Prefect block secret\.canary: its value would stand in the slice's metadata"):
        asyncio.run(TPUJobConfiguration.from_template_and_values(template, values))


def test_a_pool_without_a_word_is_a_simulated_slice_of_two_hosts() -> None:
    local = TPUJobConfiguration()
    assert local.provider == "local"
    assert local.tpu_slice.num_hosts == 2
    assert local.dollars_per_hour == 0


def test_the_form_offers_the_catalogue_and_describes_every_field() -> None:
    properties = TPUWorker.get_default_base_job_template()["variables"]["properties"]
    assert properties["accelerator_type"]["enum"] == list(SLICES)
    assert all(field.get("description") for field in properties.values())
    assert {"project", "zones", "provisioning", "max_preemptions", "max_failures", "max_cost", "valid_until"} <= properties.keys()


def test_what_is_derived() -> None:
    assert cloud().runtime == "tpu-ubuntu2204-base"
    assert cloud(accelerator_type="v5e-16", zones=["us-west4-a"]).accelerator_type == "v5litepod-16"
    assert cloud(runtime_version="mine").runtime == "mine"
    dollars = cloud().dollars_per_hour
    assert dollars == pytest.approx(64 * 0.9215)
    assert cloud(num_slices=2, provisioning="on-demand").dollars_per_hour == pytest.approx(2 * 64 * 3.22)
    assert cloud(max_cost=10 * dollars).max_active_seconds == pytest.approx(36_000)


def test_what_is_asked_of_cloud_tpu() -> None:
    configuration = cloud(
        provisioning="reserved", reservation="res", service_account="sa@mine", network="net", external_ips=False, valid_until=2
    )
    parent = configuration.parent("us-central2-b")
    resource = queued_resource(configuration, parent, "pl-1", {"a": "b"}, {"c": "d"})
    (spec,) = resource["tpu"]["node_spec"]
    assert spec["parent"] == "projects/mine/locations/us-central2-b"
    assert spec["node_id"] == "pl-1"
    assert spec["node"]["labels"] == {"a": "b"}
    assert spec["node"]["metadata"] == {"c": "d"}
    assert spec["node"]["network_config"] == {"network": "net", "subnetwork": "", "enable_external_ips": False}
    assert spec["node"]["service_account"]["email"] == "sa@mine"
    assert resource["reservation_name"] == "projects/mine/locations/us-central2-b/reservations/res"
    assert resource["queueing_policy"]["valid_until_duration"].total_seconds() == 7200
    several = queued_resource(cloud(num_slices=3), parent, "pl-1", {}, {})
    assert several["tpu"]["node_spec"][0]["multislice_params"] == {"node_count": 3, "node_id_prefix": "pl-1"}
    assert several["spot"] == {}
    from google.cloud import tpu_v2

    assert tpu_v2.QueuedResource(several).tpu.node_spec[0].node.accelerator_type == "v4-128"


def test_the_slice_carries_what_its_run_may_use_up() -> None:
    configuration = cloud(max_preemptions=7, max_failures=2, valid_until=3, max_cost=58.976)
    carried = labels(configuration, RUN, "My Pool!")
    assert all(value == label(value) for value in carried.values())
    limits = limits_of(carried)
    assert (limits.max_preemptions, limits.max_failures, limits.num_zones, limits.max_wait_seconds) == (7, 2, 2, 10_800)
    assert limits.max_active_seconds == pytest.approx(3600, abs=1)
    assert limits_of(labels(cloud(), RUN, "p")).max_active_seconds == float("inf")
    own = labels(cloud(labels={"Team": "Language Models", "prefect-flow-run-id": "mine", "prefect.io/flow-id": "f"}), RUN, "p")
    assert own == {**labels(cloud(), RUN, "p"), "team": "language_models"}


def test_what_hosts_are_told() -> None:
    told = metadata(cloud(secrets={"WANDB_API_KEY": "projects/p/secrets/w"}), {"job": {"name": "j"}}, "/python", 8476)
    launch = json.loads(told[LAUNCH])
    assert told["startup-script"].startswith("#!/usr/bin/env python3")
    assert told["enable-guest-attributes"] == "TRUE"
    assert launch["leader"] == ["python", "-m", "prefect", "flow-run", "execute"]
    assert launch["follower_job"] == {"name": "j"}
    assert launch["directory"] is None
    assert json.loads(metadata(TPUJobConfiguration(), {}, "/python", 1)[LAUNCH])["leader"][0] == "/python"


def test_names_of_slices() -> None:
    name = SliceName(RUN, 12)
    assert SliceName.parse(f"projects/p/locations/z/queuedResources/{name}") == name
    assert SliceName.parse(str(name)) == name
    assert len(str(name)) <= 63
    assert SliceName.parse("projects/p/locations/z/queuedResources/of-somebody-else") is None


def test_settings_of_the_workers_machine_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_KEY, PREFECT_API_URL, PREFECT_HOME, temporary_settings

    configuration = cloud(env={"PREFECT_LLAMA_CACHE": "/cache"})
    with temporary_settings({PREFECT_API_KEY: "canary", PREFECT_API_URL: "http://server/api", PREFECT_HOME: "/home/of/the/worker"}):
        from prefect.client.schemas.objects import FlowRun

        configuration.prepare_for_flow_run(FlowRun(id=RUN, flow_id=RUN, name="run"))
    assert "canary" not in str(configuration.env)
    assert "PREFECT_HOME" not in configuration.env
    assert configuration.env["PREFECT_API_URL"] == "http://server/api"
    assert configuration.env["PREFECT_LLAMA_CACHE"] == "/cache"
    assert configuration.env["PREFECT__FLOW_RUN_ID"] == str(RUN)
    assert configuration.env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "relinquish"


def test_time_that_earlier_slices_trained_is_counted() -> None:
    began = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    history = [
        ("SCHEDULED", 0), ("PENDING", 10), ("PENDING", 20), ("RUNNING", 100), ("SCHEDULED", 400),  # 300 s on the first
        ("PENDING", 500), ("SCHEDULED", 600),  # no slice was granted
        ("PENDING", 700), ("RUNNING", 800), ("RUNNING", 900), ("SCHEDULED", 1000),  # 200 s on the next, which was rebooted
        ("PENDING", 1100), ("RUNNING", 1200),  # on the newest, whose time is known
    ]  # fmt: skip
    states = [State(type=StateType(kind), timestamp=began + datetime.timedelta(seconds=after)) for kind, after in history]
    assert spent_seconds(reversed(states)) == 500
