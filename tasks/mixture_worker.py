"""The process that defines a mixture in SeqIO: `python -m tasks.mixture_worker SPEC.json`.

Registers a `seqio.Task` for each dataset and the `seqio.Mixture` with its rates, and compares the first document that SeqIO yields of
each split with the token store's. Prints `{"event": "rates", "rates": {dataset: share}}`, or `{"event": "error", "message": ...}`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.child import die_with_parent, emit
from model.config_base import Config
from model.token_store import StoreError, TokenStore
from tasks.data_steps import RegisteredTask
from tasks.datasets import Reading
from tasks.sources import DataError

if TYPE_CHECKING:
    import seqio


class MixtureComponentSpec(Config):
    """One dataset: where its token store is, and its files and how they are read, or the registered task it is."""

    name: str
    store: str
    files: tuple[str, ...] = ()
    reading: Reading = Reading()
    registered: RegisteredTask | None = None


class MixtureSpec(Config):
    """A mixture to define; `weights` are shares by dataset name, none for a dataset that is only evaluated."""

    name: str
    tokenizer: str
    weights: dict[str, float]
    components: tuple[MixtureComponentSpec, ...]


def main(arguments: list[str]) -> int:
    """Defines the mixture of the spec file. Exit status 0, or 1 after an "error" line."""
    die_with_parent()
    # read by TensorFlow when it is imported: no banner, and never an accelerator
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="", TPU_SKIP_MDS_QUERY="1")
    spec = MixtureSpec.model_validate_json(Path(arguments[0]).read_bytes())
    try:
        emit("rates", rates=define(spec))
    except (DataError, StoreError) as error:
        emit("error", message=str(error))
        return 1
    return 0


def define(spec: MixtureSpec) -> dict[str, float]:
    """Registers the tasks and the mixture; the rates that SeqIO has for it, as shares that add up to 1.

    Raises DataError where a token store does not hold what SeqIO yields.
    """
    from tasks.seqio_registry import add_mixture, add_task, registered_task, seqio_name

    tasks: dict[str, seqio.Task] = {}
    for component in spec.components:
        if component.registered is not None:
            task = registered_task(component.registered.task, component.registered.module)
        else:
            name = seqio_name(f"{spec.name}.{component.name}")
            task = add_task(name, [Path(path) for path in component.files], component.reading, spec.tokenizer)
        _compare_first_documents(task, component)
        tasks[component.name] = task
    mixture = add_mixture(spec.name, {tasks[name].name: weight for name, weight in spec.weights.items()})
    rates = {name: float(mixture.get_rate(tasks[name])) for name in spec.weights}
    return {name: rate / sum(rates.values()) for name, rate in rates.items()}


def _compare_first_documents(task: seqio.Task, component: MixtureComponentSpec) -> None:
    if component.registered is not None:
        return  # its BOS and EOS may have been added by us
    for split, stream in TokenStore.open(component.store).splits.items():
        if not stream.num_documents:
            continue
        example = next(iter(task.get_dataset(None, split=split, shuffle=False, num_epochs=1).take(1).as_numpy_iterator()))
        if not np.array_equal(example["targets"], stream.document(0)):
            raise DataError(
                f"the token store {component.store}, split {split!r}, does not begin with the document that SeqIO yields for "
                f"{component.name!r}: run its step again with --force 'tokens/{component.name}'"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
