"""An experiment as a Prefect deployment: `train-llama/NAME` on a work pool, with every part of the run among its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from model.child import CHECKOUT
from tasks.config import RunConfig
from tasks.mixture_config import Dataset, Mixture
from tasks.places import Place
from tasks.sources.local_files import is_local, local_path
from tasks.vocabularies import ByteTokenizer, TokenizerTraining

ENTRYPOINT = "flows/train_flow.py:train_llama"


def deploy_all(configs: Sequence[RunConfig], pool: str, root: Place, description: str = "") -> Iterator[str]:
    """Deploys each; yields a line for each that says how to run it.

    Raises:
        ValueError: as `deploy`, or, before any is made, a name is one of the project's own deployments.
    """
    taken = shipped_names()
    for config in configs:
        if config.name in taken:
            raise ValueError(
                f"--deploy: train-llama/{config.name} is a deployment of prefect.yaml, which this one would replace: rename the run "
                f"(--name, or its name in the file where that has several), for example to {config.name}-experiment"
            )
    for config in configs:
        yield deploy(config, pool, root, description)


def shipped_names() -> frozenset[str]:
    """Names of the project's own deployments of the flow."""
    import yaml

    deployments = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return frozenset(each["name"] for each in deployments if each["entrypoint"] == ENTRYPOINT)


def deploy(config: RunConfig, pool: str, root: Place, description: str = "") -> str:
    """Makes the deployment, or makes it anew; returns a line that says how to run it. A run through it has the fingerprints of `config`.

    The worker of the pool runs the code of this checkout, and artifacts lie below `root`, as they do for the file itself.

    Raises:
        ValueError: there is no Prefect server, or no such work pool on it.
    """
    import flows.prefect_settings  # noqa: F401  (before Prefect reads its settings)

    # isort: split
    from prefect import Flow
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise ValueError(
            "--deploy needs a Prefect server: run `prefect server start` in another terminal, and "
            "`prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`"
        )
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            there = ", ".join(sorted(each.name for each in client.read_work_pools())) or "none"
            raise ValueError(
                f"--deploy={pool!r}: no such work pool (there are: {there}): `prefect work-pool create --type process {pool}` makes it"
            ) from None
    flow = Flow.from_source(source=str(CHECKOUT), entrypoint=ENTRYPOINT)
    assert isinstance(flow, Flow)  # Prefect's annotation covers its asynchronous use too
    flow.deploy(
        name=config.name,
        work_pool_name=pool,
        parameters={**parameters_of(config, root), "description": description},
        description=description or f"The experiment {config.name}.",
        tags=["train-llama", "restart-on-crash", *config.tags],
        build=False,
        push=False,
        print_next_steps=False,
    )
    return f"deployed train-llama/{config.name} on the work pool {pool}: prefect deployment run train-llama/{config.name}"


def parameters_of(config: RunConfig, root: Place) -> dict[str, object]:
    """The flow's parameters for a run, as JSON: files of this machine by absolute paths, as the worker stands in another directory."""
    train = config.train
    begin = train.initialize_from_checkpoint_path
    if begin is not None and is_local(begin):
        train = train.model_copy(update={"initialize_from_checkpoint_path": str(local_path(begin))})
    if train.initialize_from_hf is not None:
        train = train.model_copy(update={"initialize_from_hf": str(local_path(train.initialize_from_hf))})
    placed = config.model_copy(update={"train": train, "data": _placed(config.data)})
    return {**placed.model_dump(mode="json"), "root": str(root)}


def _placed(mixture: Mixture) -> Mixture:
    tokenizer = mixture.tokenizer
    if not isinstance(tokenizer, ByteTokenizer | TokenizerTraining) and is_local(tokenizer.path):
        tokenizer = tokenizer.model_copy(update={"path": _absolute(tokenizer.path)})
    return mixture.model_copy(update={"tokenizer": tokenizer, "datasets": tuple(map(_placed_dataset, mixture.datasets))})


def _placed_dataset(dataset: Dataset) -> Dataset:
    sources = tuple(_absolute(source) if is_local(source) else source for source in dataset.sources)
    return dataset.model_copy(update={"source": sources[0] if isinstance(dataset.source, str) else sources})


def _absolute(source: str) -> str:
    return source if source.startswith(("package:", "${")) else str(local_path(source))
