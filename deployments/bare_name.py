"""Lets `prefect deployment run train-llama` mean the flow's default deployment.

Prefect asks for FLOW/DEPLOYMENT and refuses a name without a slash. This plugin, loaded through the entry point group
`prefect.plugins` where `[tool.prefect.plugins] enabled = true` holds, completes exactly those names:
a deployment named like its flow, else the flow's only deployment, else its only one with the tag `default`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.plugins import register_hook

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

DEFAULT_TAG = "default"


def choose(name: str, deployments: dict[str, list[str]]) -> str:
    """The full name that the bare `name` stands for.

    Args:
        deployments: tags by full name (`flow/deployment`) of every deployment of the flow `name`.

    Raises:
        ValueError: there is none, or no telling which; lists what there is.
    """
    if not deployments:
        raise ValueError(f"there is no flow {name!r} with a deployment on this server: run `prefect deploy --all` first")
    tagged = [full for full, tags in deployments.items() if DEFAULT_TAG in tags]
    for candidates in ([full for full in deployments if full == f"{name}/{name}"], list(deployments), tagged):
        if len(candidates) == 1:
            return candidates[0]
    listed = ", ".join(sorted(deployments))
    raise ValueError(f"{name!r} has several deployments: {listed}; name one of them, or tag one {DEFAULT_TAG!r}")


async def _complete(client: PrefectClient, name: str) -> str:
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    found = await client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[name])))
    return choose(name, {f"{name}/{deployment.name}": list(deployment.tags) for deployment in found})


@register_hook
def setup_environment(*, ctx: Any) -> None:
    """Wraps the client's look-up by name, once."""
    from prefect.client.orchestration import PrefectClient

    original = PrefectClient.read_deployment_by_name
    if getattr(original, "completes_bare_names", False):
        return

    async def read_deployment_by_name(self: PrefectClient, name: str) -> Any:
        return await original(self, name if "/" in name else await _complete(self, name))

    read_deployment_by_name.completes_bare_names = True  # type: ignore[attr-defined]
    PrefectClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[method-assign]
