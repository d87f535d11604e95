"""The form of a `tpu` work pool: what a person chooses, checked before anything is asked of Cloud TPU.

The same fields are the base job template's variables (the form in the UI), a deployment's `job_variables` and the
configuration of one job.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, Literal

from prefect.workers.base import BaseJobConfiguration, BaseVariables
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model.preflight.prices import PRICES
from model.secret_text import is_secret_name
from model.slices import SLICES, Slice, slice_named

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

RUNTIME_VERSIONS = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
LOCAL_ZONE = "local-a"
_BLOCK = re.compile(r"\{\{\s*prefect\.blocks\.([^\s}]+)")

Provider = Literal["local", "cloud"]
Provisioning = Literal["spot", "on-demand", "reserved", "flex-start"]


class SliceFields(BaseModel):
    """What to ask Cloud TPU for, and for how long to keep asking."""

    provider: Provider = Field(
        default="local",
        description="`cloud`: Cloud TPU, in your project. `local`: hosts are processes here with virtual CPU devices, at no cost.",
    )
    project: str | None = Field(default=None, description="Google Cloud project that owns the TPUs; needed for `cloud`.")
    zones: list[str] = Field(
        default=[],
        description="Zones to try, in this order, for example us-central2-b; needed for `cloud`. Buckets should lie in their region.",
    )
    accelerator_type: str = Field(
        default="v4-16",
        description="The slice, for example v4-128, v5litepod-16, v5p-256 or v6e-32. `local` simulates its hosts.",
        json_schema_extra={"enum": list(SLICES)},
    )
    num_slices: int = Field(default=1, ge=1, le=256, description="Slices of that type, joined by the data center network.")
    runtime_version: str | None = Field(default=None, description="TPU VM image. Unset: the one for the generation.")
    provisioning: Provisioning = Field(default="spot", description="How capacity is obtained. Spot costs least and can be taken back.")
    reservation: str | None = Field(default=None, description="Name of the reservation, for `reserved`.")
    network: str | None = Field(default=None, description="VPC network of the hosts. Unset: default.")
    subnetwork: str | None = Field(default=None, description="Subnetwork of the hosts.")
    external_ips: bool = Field(default=True, description="Whether hosts get external addresses; without, the network needs Cloud NAT.")
    service_account: str | None = Field(default=None, description="Service account of the hosts; it needs the buckets and the secrets.")
    image: str | None = Field(
        default=None, description="Container image with this project, best by digest. Unset: `repository` is installed."
    )
    repository: str | None = Field(default=None, description="Git URL of this project for hosts without an image.")
    revision: str | None = Field(default=None, description="Commit of `repository`.")
    secrets: dict[str, str] = Field(
        default={},
        description="Environment variables from Secret Manager, read on the first host: {PREFECT_API_KEY: projects/P/secrets/S}.",
    )
    cache_in_memory: bool = Field(
        default=False,
        description="Hosts keep the tokens that they bring from a bucket in memory. Off: on their disk, which has room for about 75 GB.",
    )
    valid_until: float = Field(
        default=24.0, gt=0, le=24 * 30, description="Hours to wait in one zone's queue before the next zone is tried."
    )
    max_preemptions: int = Field(default=100, ge=0, description="How often the run is resumed after Cloud TPU took its slice back.")
    max_failures: int = Field(default=3, ge=0, description="How often the run is resumed after a host failed. Preemptions do not count.")
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="US dollars at list price for the time of a run's slices; then they are deleted, and the run saves and ends.",
    )
    poll_seconds: float = Field(default=2.0, gt=0, le=10, description="How often the worker looks at slices and runs.")
    devices_per_host: int | None = Field(
        default=None, ge=1, le=8, description="For `local`: virtual devices of a host. Unset: as the real one."
    )

    @field_validator("accelerator_type")
    @classmethod
    def _known_slice(cls, value: str) -> str:
        return slice_named(value).name

    @field_validator("zones")
    @classmethod
    def _zone_names(cls, value: list[str]) -> list[str]:
        for zone in value:
            if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
                raise ValueError(f"zones: {zone!r} is no zone: write it like us-central2-b, a region and a letter")
        return value

    @model_validator(mode="after")
    def _complete(self) -> SliceFields:
        if self.provisioning == "flex-start":
            raise ValueError(
                "provisioning='flex-start': Cloud TPU offers it through its alpha command line only, not through the API that this worker "
                "uses: choose 'spot', 'on-demand' or 'reserved'"
            )
        if self.provider == "cloud":
            lacking = [name for name in ("project", "zones") if not getattr(self, name)]
            if lacking:
                raise ValueError(
                    f"provider='cloud' needs {' and '.join(lacking)}: set them in the work pool or the deployment's job_variables"
                )
            if not self.image and not (self.repository and self.revision):
                raise ValueError("provider='cloud' needs image, or repository and revision: hosts get this project from there")
        if (self.provisioning == "reserved") != (self.reservation is not None):
            raise ValueError(
                f"provisioning={self.provisioning!r} and reservation={self.reservation!r}: a reservation goes with 'reserved' only"
            )
        return self

    @property
    def tpu_slice(self) -> Slice:
        """The slice of the catalogue."""
        return slice_named(self.accelerator_type)

    @property
    def places(self) -> list[str]:
        """The zones to try; `local` has one of its own."""
        return self.zones if self.provider == "cloud" else [LOCAL_ZONE]

    def parent(self, zone: str) -> str:
        """Where Cloud TPU keeps slices of `zone`: `projects/P/locations/Z`."""
        return f"projects/{self.project or 'local'}/locations/{zone}"

    @property
    def runtime(self) -> str:
        """The TPU VM image."""
        return self.runtime_version or RUNTIME_VERSIONS[self.tpu_slice.generation]

    @property
    def dollars_per_hour(self) -> float:
        """List price of all slices; nothing for `local`."""
        price = PRICES[self.tpu_slice.generation]
        rate = price.spot if self.provisioning == "spot" else price.on_demand
        return 0.0 if self.provider == "local" else rate * self.tpu_slice.num_chips * self.num_slices

    @property
    def max_active_seconds(self) -> float:
        """How long a slice may be active for `max_cost`."""
        return math.inf if self.max_cost is None or not self.dollars_per_hour else 3600 * self.max_cost / self.dollars_per_hour


class TPUVariables(BaseVariables, SliceFields):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The work pool's form."""

    name: str | None = Field(default=None, description="Of no use here: slices are named after their flow run.")
    command: str | None = Field(default=None, description="Of no use here: hosts run this project.")
    labels: dict[str, str] = Field(default={}, description="Labels of the slice in Google Cloud, for your bills.")


class TPUJobConfiguration(BaseJobConfiguration, SliceFields):
    """One job: the form's values for one flow run."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an error becomes the message of a state, which everybody can read

    @model_validator(mode="after")
    def _no_secrets_in_clear(self) -> TPUJobConfiguration:
        named = [name for name in self.env if is_secret_name(name)]
        if named:
            raise ValueError(
                f"env names {', '.join(named)}: job variables are stored in clear. "
                "Put the value into Secret Manager and its name into `secrets`"
            )
        return self

    @classmethod
    async def from_template_and_values(
        cls, base_job_template: dict[str, Any], values: dict[str, Any], client: PrefectClient | None = None
    ) -> TPUJobConfiguration:
        """The configuration of one job, of the pool's form and what a deployment and a run set.

        Raises:
            ValueError: one of these names a Prefect block, whose value everybody could read.
        """
        named = _BLOCK.search(json.dumps([base_job_template, values]))
        if named:
            raise ValueError(
                f"the job variables name the Prefect block {named[1]}: its value would stand in the slice's metadata in clear. "
                "Put the value into Secret Manager and its name into `secrets`"
            )
        return await super().from_template_and_values(base_job_template, values, client=client)

    def prepare_for_flow_run(self, *arguments: Any, **named: Any) -> None:
        """Adds what the engine on host 0 needs; of this machine's settings only what it can use."""
        asked = {"PREFECT_API_URL", *self.env}
        super().prepare_for_flow_run(*arguments, **named)
        # Prefect hands on every setting of this machine, its paths and its API key too, and metadata can be read by others.
        self.env = {
            key: value for key, value in self.env.items() if key in asked or not key.startswith("PREFECT_") or key.startswith("PREFECT__")
        }
        # Told to stop, the engine leaves the run's state alone: the worker, which can tell a preemption from a deletion, sets it.
        self.env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] = "relinquish"
        self.env["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
        self.env["DO_NOT_TRACK"] = "1"
