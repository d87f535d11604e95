"""Training input: our BatchLoader beside SeqIO's own path on the same tasks, mixture, tokens and batch shape.

The flow's own steps make the mixture. The peer reads SeqIO's offline cache of the same tasks (tokenized ahead, as ours is):
`seqio.get_dataset(use_cached=True, shuffle=True)`, `LMFeatureConverter(pack=True)`, `batch`, `prefetch`, numpy arrays.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import CHECKOUT, OURS, PEER, child, compare, interleave, main, peak_rss_mib, run_process, since_spawn, units

SEQ_LEN, BATCH_SIZE, SEED = 2048, 32, 0
UNITS = {"tokens_per_cpu_s": "million tokens / CPU-second"} | units("million tokens", "batch")


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Builds the mixture and SeqIO's cache, then measures both sides by turns."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        flow = [sys.executable, str(CHECKOUT / "flows" / "train.py"), "--only", "mixtures", "--root", str(root)]
        run_process(flow, PREFECT_HOME=str(Path(temporary) / "prefect"))
        (mixture,) = (path.parent for path in (root / "mixtures").glob("shakespeare-*/manifest.json"))
        paths = {"mixture": str(mixture), "cache": temporary}
        child(__file__, side="cache", **paths)
        measured = interleave(__file__, rounds, seconds=1.0 if quick else 5.0, **paths)
    notes = {f"fill of {side}": f"{rows[0]['fill']:.3f}" for side, rows in measured.items()}
    case = {"case": f"sequences of {SEQ_LEN}, batch {BATCH_SIZE}", "rounds": rounds, "notes": notes, "metrics": compare(measured, UNITS)}
    what = "BatchLoader (ours) beside SeqIO, cached, LMFeatureConverter(pack=True); padding is not counted"
    return {"what": what, "packages": ["numpy", "seqio", "tensorflow"], "cases": [case]}


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """One child process: SeqIO's cache is written, or one side reads batches for `seconds`."""
    if spec["side"] == "cache":
        return write_cache(Path(spec["mixture"]), Path(spec["cache"]))
    batches = {OURS: our_batches, PEER: seqio_batches}[spec["side"]](spec)
    next(batches)
    first = since_spawn(spec)
    tokens = places = 0
    cpu, wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < spec["seconds"]:
        segment_ids_BS = next(batches)
        tokens += int((segment_ids_BS > 0).sum())
        places += segment_ids_BS.size
    cpu, wall, millions = time.process_time() - cpu, time.perf_counter() - wall, tokens / 1e6
    rates = {"tokens_per_cpu_s": millions / cpu, "cpu_s": cpu / millions, "wall_s": wall / millions}
    return {**first, **rates, "fill": tokens / places, "peak_rss_mib": peak_rss_mib()}


def our_batches(spec: dict[str, Any]) -> Iterator[Any]:
    """Segment ids [B, S] of our batches, all five arrays of which are made."""
    from model.batches import BatchLoader

    loader = BatchLoader(Path(spec["mixture"]), seq_len=SEQ_LEN, global_batch_size=BATCH_SIZE, seed=SEED)
    return (loader.batch(step)["segment_ids"] for step in itertools.count())


def seqio_batches(spec: dict[str, Any]) -> Iterator[Any]:
    """Segment ids [B, S] of SeqIO's batches, all five arrays of which are made and handed over as numpy arrays."""
    import seqio
    import tensorflow as tf

    name = register(Path(spec["mixture"]))[0]
    seqio.set_global_cache_dirs([spec["cache"]])
    converter = seqio.LMFeatureConverter(pack=True)
    dataset = seqio.get_dataset(name, {"targets": SEQ_LEN}, converter, use_cached=True, shuffle=True, seed=SEED, num_epochs=None)
    batches = dataset.batch(BATCH_SIZE, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    return (batch["decoder_segment_ids"] for batch in batches)


def register(mixture: Path) -> tuple[str, list[str]]:
    """Registers the tasks and the mixture that the artifact was made of; the names of the mixture and of the tasks."""
    from tasks.datasets import shakespeare_mixture
    from tasks.seqio_registry import register

    declared = shakespeare_mixture()
    root, tokenizer = mixture.parent.parent, json.loads((mixture / "mixture.json").read_text())["tokenizer"]["path"]
    raw = {data.name: next((root / "raw").glob(f"{data.name}-*")) / "files" for data in declared.datasets}
    names = register(declared, raw, (mixture / tokenizer).resolve())
    return names.mixture, list(names.tasks.values())


def write_cache(mixture: Path, cache: Path) -> dict[str, Any]:
    """SeqIO's offline cache as `seqio_cache_tasks` lays it out, without Beam: TFRecords of each task's training tokens, by shard."""
    import seqio
    import tensorflow as tf

    for name in register(mixture)[1]:
        task, directory = seqio.TaskRegistry.get(name), cache / name
        shards = len(task.source.list_shards("train"))
        directory.mkdir()
        examples = list(task.preprocess_precache(task.source.get_dataset("train", shuffle=False)).as_numpy_iterator())
        for shard in range(shards):
            with tf.io.TFRecordWriter(str(directory / f"train.tfrecord-{shard:05d}-of-{shards:05d}")) as writer:
                for example in examples[shard::shards]:
                    writer.write(seqio.utils.dict_to_tfexample({"targets": example["targets"]}).SerializeToString())
        info = {"num_shards": shards, "features": {"targets": {"shape": [None], "dtype": "int32"}}, "seqio_version": seqio.__version__}
        (directory / "info.train.json").write_text(json.dumps(info))
        (directory / "stats.train.json").write_text(json.dumps({"examples": len(examples)}))
        (directory / "COMPLETED").touch()
    return {}


if __name__ == "__main__":
    sys.exit(main({"input_path": run}, side))
