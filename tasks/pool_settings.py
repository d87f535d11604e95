"""What a work pool of type `tpu` asks for, as its deployment and a run complete it: read through the Prefect API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from model.train_config import SimpleTrainConfig

if TYPE_CHECKING:
    from prefect.client.schemas.objects import WorkPool

TPU = "tpu"


class PoolSettings(BaseModel):
    """The fields of the pool's form (`deployments.tpu.form`) that decide whether a job can run there; others are left to the worker."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pool: str
    provider: Literal["local", "cloud"] = "local"
    project: str | None = None
    zones: tuple[str, ...] = ()
    accelerator_type: str | None = None
    num_slices: int = 1
    provisioning: str = "spot"
    max_cost: float | None = None
    cache_in_memory: bool = False

    @classmethod
    def of(cls, work_pool: WorkPool, *variables: Mapping[str, Any]) -> PoolSettings:
        """The form's defaults, overruled by `variables`: those of the deployment, then those of the run. Placeholders count as unset.

        Raises:
            ValueError: a value that no slice can be asked for with, by its field.
        """
        properties = work_pool.base_job_template.get("variables", {}).get("properties", {})
        values = {name: field["default"] for name, field in properties.items() if "default" in field}
        for each in variables:
            values |= each
        given = {name: value for name, value in values.items() if value is not None and not (isinstance(value, str) and "{{" in value)}
        try:
            return cls(**{**given, "pool": work_pool.name})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{field}={first['input']!r} of the work pool {work_pool.name!r}: {first['msg']}: correct it in the pool's form or in the "
                "deployment's job_variables"
            ) from None


def job_variables(train: SimpleTrainConfig) -> dict[str, Any]:
    """What a run of this training asks for beside what the pool and its deployment say."""
    if train.accelerator_type is None:
        return {}
    return {"accelerator_type": train.accelerator_type, "num_slices": train.slice_count}
