"""Run as a child by test_tokenization: all that needs TensorFlow, which is imported once. Prints one JSON object.

    python -m tests.tokenization_probe SPEC.json RAW_DIRECTORY STORE

TensorFlow is imported but not used before the forks, so that each attempt starts in no time and can be killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="")

import numpy as np
import seqio
import tensorflow as tf

from model.token_writer import ShardWriter
from tasks import tokenize_worker
from tasks.data_steps import RegisteredTask
from tasks.datasets import Mixture
from tasks.seqio_registry import register
from tasks.tokenization_spec import TokenizationSpec


def in_fork(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process; its wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with contextlib.redirect_stdout(io.StringIO()):
            work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def die_at(call: int, owner: Any, name: str) -> None:
    """From now on, the `call`-th use of `owner.name` kills this process before it does anything."""
    real, count = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def killed_again_and_again(spec: TokenizationSpec) -> int:
    """Kills attempts at many moments, then lets one end; the number that were really killed."""
    kills = 0
    # before a shard's offsets are on disk, before its ledger is, before it has its name, between documents, two shards on
    moments = [(3, os, "fsync"), (5, os, "fsync"), (3, os, "replace"), (3, ShardWriter, "add"), (9, os, "fsync")]
    for call, owner, name in moments:

        def attempt(call: int = call, owner: Any = owner, name: str = name) -> None:
            # Path.replace goes through os.replace
            die_at(call, owner, name)
            tokenize_worker.tokenize_shards(spec)

        kills += in_fork(attempt) == signal.SIGKILL
    assert in_fork(lambda: tokenize_worker.tokenize_shards(spec)) == 0
    return kills


def seqio_alone(files: list[str], tokenizer: str) -> list[list[int]]:
    """The documents' ids from SeqIO's own text source, tokenizer and EOS steps, with nothing of this project in it."""
    source: Any = seqio.TextLineDataSource({"train": files})
    feature = seqio.Feature(seqio.SentencePieceVocabulary(tokenizer), add_eos=True, dtype=tf.int32)
    seqio.TaskRegistry.add(
        "alone",
        source=source,
        preprocessors=[
            lambda dataset: dataset.map(lambda line: {"targets": line}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": feature},
    )
    found: list[list[int]] = []
    for index in range(len(files)):
        shard = seqio.ShardInfo(index, len(files))
        dataset = seqio.get_mixture_or_task("alone").get_dataset(None, "train", shuffle=False, shard_info=shard)
        found += [example["targets"].tolist() for example in dataset.as_numpy_iterator()]
    return found


def through_the_mixture(mixture: Mixture, raw: Path, tokenizer: str) -> dict[str, Any]:
    """What SeqIO's registries say of a registered mixture."""
    names = register(mixture, {dataset.name: raw for dataset in mixture.datasets}, tokenizer)
    names = register(mixture, {dataset.name: raw for dataset in mixture.datasets}, tokenizer)  # twice does no harm
    registered: Any = seqio.get_mixture_or_task(names.mixture)
    dataset = registered.get_dataset(None, "train", shuffle=False, num_epochs=1)
    examples = [example["targets"].tolist() for example in dataset.take(40).as_numpy_iterator()]
    task: Any = seqio.get_mixture_or_task(names.tasks["web"])
    shuffled = task.get_dataset(None, "train", shuffle=True, seed=1)
    return {
        "names": [names.mixture, dict(names.tasks)],
        "rates": {name: float(rate) for name, rate in registered.rate_per_task_name.items()},
        "examples": examples,
        "shuffled": sorted(example["targets"].tolist() for example in shuffled.as_numpy_iterator()),
        "shards": list(task.source.list_shards("train")),
    }


def worker_error(spec: TokenizationSpec) -> str:
    """The message with which the worker refuses a spec."""
    try:
        tokenize_worker.tokenize_shards(spec)
    except ValueError as error:
        return str(error)
    return "no error"


def main(arguments: list[str]) -> None:
    """Does everything and prints it."""
    spec = TokenizationSpec.model_validate_json(Path(arguments[0]).read_bytes())
    raw, store = Path(arguments[1]), Path(arguments[2])
    result: dict[str, Any] = {"kills": killed_again_and_again(spec.model_copy(update={"store": str(store / "killed")}))}
    result["seqio"] = seqio_alone(list(spec.files), spec.tokenizer)
    web = {"name": "web", "source": "unused", "document": "line", "holdout": 0.2}
    mixture = Mixture.model_validate({"name": "my-mix", "datasets": (web, {**web, "name": "wiki"}), "weights": {"web": 0.75, "wiki": 0.25}})
    result["mixture"] = through_the_mixture(mixture, raw, spec.tokenizer)
    # a task by name: SeqIO's own, with EOS and without BOS, three shards, no validation split
    by_name = {"files": (), "jobs": (), "registered": RegisteredTask(task="alone")}
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink):
        tokenize_worker.tokenize_shards(spec.model_copy(update={**by_name, "store": str(store / "registered")}))
    result["events"] = [json.loads(line) for line in sink.getvalue().splitlines()]
    errors = {
        "unknown": {"registered": RegisteredTask(task="nowhere")},
        "mixture": {"registered": RegisteredTask(task="my_mix")},
        "module": {"registered": RegisteredTask(task="alone", module="no.such.module")},
        "vocabulary": {"tokenizer_sha256": "0" * 64},
    }
    bad = store / "bad.txt"
    bad.write_bytes(b"fine\nbad \xff\n")
    errors["reader"] = {"registered": None, "files": (str(bad),), "jobs": (spec.jobs[0].model_copy(update={"of": 1, "key": "other"}),)}
    with contextlib.redirect_stdout(sink):
        result["errors"] = {
            name: worker_error(spec.model_copy(update={**by_name, "store": str(store / "errors"), **change}))
            for name, change in errors.items()
        }
    print(json.dumps(result, default=np.ndarray.tolist))


if __name__ == "__main__":
    main(sys.argv[1:])
