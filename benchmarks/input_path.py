"""Training input: our BatchLoader beside SeqIO's own path on the same tokens, rates and batch shape.

The flow's own steps make the mixture. The peer reads SeqIO's offline cache of the same stores (tokenized ahead, as ours is):
`seqio.get_dataset(use_cached=True, shuffle=True)`, `LMFeatureConverter(pack=True)`, `batch`, `prefetch`, numpy arrays.
Beside the rates: what each side has to save to go on at a step, how long ours takes to get to step 1e9, whether TensorFlow is
among the trainer's modules, and how full best-fit packing fills the rows. It packs each dataset by itself, and the dictionaries
of the corpus have entries of much the same length, so its text is also packed as one dataset.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import Missing, corpus, sentencepiece_model
from data_run import corpus_mixture, make
from measure import OURS, PEER, bar, child, compare, interleave, main, peak_rss_mib, since_spawn, units

SEQ_LEN, BATCH_SIZE, SEED, FAR_STEP = 2048, 32, 0, 10**9
UNITS = {"tokens_per_cpu_s": "million tokens / CPU-second"} | units("million tokens", "batch")
KINDS = ("raw", "tokenizers", "tokens", "mixtures")


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Builds the mixtures and SeqIO's caches, then measures both sides by turns, on the packaged text and on the large corpus."""
    what = "BatchLoader (ours) beside SeqIO, cached, LMFeatureConverter(pack=True); padding is not counted"
    result: dict[str, Any] = {"what": what, "packages": ["numpy", "seqio", "tensorflow"], "cases": [], "bars": []}
    for large in (False,) if quick else (False, True):
        with tempfile.TemporaryDirectory() as temporary:
            try:
                case, bars = measure(Path(temporary), rounds, 1.0 if quick else 5.0, large)
            except Missing as missing:
                result["what"] += f"; not on the large corpus: {missing}"
                continue
        result["cases"].append(case)
        result["bars"] += bars if large else []
    return result


def measure(directory: Path, rounds: int, seconds: float, large: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One corpus: the case and what it is held against."""
    spec: dict[str, Any] = {"large": large, "root": str(directory / "root"), "cache": str(directory / "cache")}
    if large:
        text = corpus()
        spec |= {"files": {name: [str(file) for file in files] for name, files in text.files.items()}, "model": str(sentencepiece_model())}
    made = child(__file__, side="make", **spec)
    spec |= {"mixture": made["concat"]}
    measured = interleave(__file__, rounds, seconds=seconds, **spec)
    trainer = child(__file__, side="trainer")
    fill = {key: child(__file__, side=OURS, seconds=seconds, mixture=made[key])["fill"] for key in ("best_fit", "best_fit_together")}
    metrics = compare(measured, UNITS)
    saved = {side: max(row["state_bytes"] for row in rows) for side, rows in measured.items()}
    slowest = max(row["seek_ms"] for row in measured[OURS])
    modules = trainer["modules"] + measured[OURS][0]["modules"]
    notes = {f"fill of {side}": f"{rows[0]['fill']:.3f}" for side, rows in measured.items()}
    notes |= {f"saved by {side}": f"{number} bytes" for side, number in saved.items()}
    notes |= {"to step 1e9": f"{slowest:.1f} ms", "best-fit fill, each dataset by itself": f"{fill['best_fit']:.4f}"}
    notes |= {"all of it as one dataset": f"{fill['best_fit_together']:.4f}"}
    bars = [
        bar("times SeqIO's tokens per CPU-second", metrics["tokens_per_cpu_s"]["ratio"], at_least=40),
        bar("CPU-seconds to the first batch, imports included, over SeqIO's", metrics["first_cpu_s"]["ratio"], at_most=1 / 20),
        bar("memory over SeqIO's", metrics["peak_rss_mib"]["ratio"], at_most=1 / 8),
        bar("milliseconds to step 1e9", slowest, at_most=50),
        bar("bytes of data state in a checkpoint", saved[OURS], at_most=1024),
        bar("of tensorflow and seqio, modules in the loader's process and in the trainer's", modules, at_most=0),
        bar("best-fit fill, all of it as one dataset", fill["best_fit_together"], at_least=0.995),
    ]
    which = "corpus of 106 MB" if large else "packaged text"
    case = {"case": f"{which}, sequences of {SEQ_LEN}, batch {BATCH_SIZE}", "rounds": rounds, "notes": notes, "metrics": metrics}
    return case, bars


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """One child process: mixtures and caches are made, or one side reads batches for `seconds`, or what is saved is looked at."""
    if spec["side"] == "make":
        return make_mixtures(spec)
    if spec["side"] == "trainer":
        import model.training_process

        return {"modules": tensorflow_modules(), "of": model.training_process.__name__}
    if spec["side"] == PEER:
        return read(spec, seqio_batches(spec))
    measured = read(spec, OurBatches(spec["mixture"], 0))
    began = time.perf_counter()
    next(OurBatches(spec["mixture"], FAR_STEP))
    return {**measured, "seek_ms": 1000 * (time.perf_counter() - began), "modules": tensorflow_modules()}


def tensorflow_modules() -> int:
    """How many of TensorFlow and SeqIO this process has imported."""
    return len({"tensorflow", "seqio"} & sys.modules.keys())


def read(spec: dict[str, Any], batches: OurBatches | SeqioBatches) -> dict[str, Any]:
    """The rates of an iterator over segment ids [B, S], all of whose batch is made, and what it saves to go on later."""
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
    measured = {**first, **rates, "fill": tokens / places, "peak_rss_mib": peak_rss_mib()}
    return {**measured, "state_bytes": batches.state_bytes()}


class OurBatches(Iterator[Any]):
    """Segment ids [B, S] of our batches from a step on, all five arrays of which are made."""

    def __init__(self, mixture: str, step: int) -> None:
        from model.batches import BatchLoader

        self._loader = BatchLoader(Path(mixture), seq_len=SEQ_LEN, global_batch_size=BATCH_SIZE, seed=SEED)
        self._step = step

    def __next__(self) -> Any:
        batch = self._loader.batch(self._step)
        self._step += 1
        return batch["segment_ids"]

    def state_bytes(self) -> int:
        """What a checkpoint holds of the data."""
        return len(json.dumps(self._loader.state(self._step)))


class SeqioBatches(Iterator[Any]):
    """Segment ids [B, S] of SeqIO's batches, all five arrays of which are made and handed over as numpy arrays."""

    def __init__(self, dataset: Any) -> None:
        self._iterator = iter(dataset)

    def __next__(self) -> Any:
        batch = {name: value.numpy() for name, value in next(self._iterator).items()}
        return batch["decoder_segment_ids"]

    def state_bytes(self) -> int:
        """What TensorFlow saves of the iterator so that it can go on."""
        import tensorflow as tf

        with tempfile.TemporaryDirectory() as directory:
            tf.train.Checkpoint(iterator=self._iterator).save(f"{directory}/iterator")
            return sum(path.stat().st_size for path in Path(directory).iterdir())


def seqio_batches(spec: dict[str, Any]) -> SeqioBatches:
    """SeqIO's path over the exported caches."""
    import seqio
    import tensorflow as tf

    declared = json.loads((Path(spec["mixture"]) / "mixture.json").read_text())
    vocabulary = seqio.PassThroughVocabulary(declared["tokenizer"]["vocab_size"], declared["tokenizer"]["eos_id"])
    rates = {task_name(name): share for name, share in declared["stages"][0]["shares"].items()}
    source: Any = seqio.TextLineDataSource({"train": "not read, the cache is"})
    for name in rates:
        seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=[seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos],
            output_features={"targets": seqio.Feature(vocabulary, dtype=tf.int32, add_eos=True)},
        )
    seqio.MixtureRegistry.add("benchmark", list(rates.items()))
    seqio.set_global_cache_dirs([spec["cache"]])
    converter = seqio.LMFeatureConverter(pack=True)
    dataset = seqio.get_dataset("benchmark", {"targets": SEQ_LEN}, converter, use_cached=True, shuffle=True, seed=SEED, num_epochs=None)
    return SeqioBatches(dataset.batch(BATCH_SIZE, drop_remainder=True).prefetch(tf.data.AUTOTUNE))


def task_name(dataset: str) -> str:
    """The SeqIO task that stands for a dataset."""
    return f"benchmark_{dataset}"


def make_mixtures(spec: dict[str, Any]) -> dict[str, Any]:
    """The mixture with both packings, the same text in one dataset with best fit, and SeqIO's caches; where the mixtures are."""
    from corpus import Corpus

    from tasks.datasets import Dataset, Mixture, SentencePieceFile, shakespeare_mixture
    from tasks.seqio_bridge.seqio_cache import export_cache

    if spec["large"]:
        files = {name: tuple(map(Path, files)) for name, files in spec["files"].items()}
        text = Corpus(files=files, documents=0, text_bytes=0, sha256="")
        mixture = corpus_mixture(text, SentencePieceFile(path=spec["model"]))
    else:
        mixture = shakespeare_mixture()
    fields = {name: getattr(mixture, name) for name in Mixture.model_fields}
    sources = tuple(source for dataset in mixture.datasets for source in dataset.sources)
    reading = dict(mixture.datasets[0].reading)
    together = {"datasets": (Dataset(name="together", source=sources, **reading),), "weights": {"together": 1.0}}
    changes = {"concat": {}, "best_fit": {"packing": "best_fit"}, "best_fit_together": {"packing": "best_fit", **together}}
    made = {key: make(Mixture(**{**fields, **change}), Path(spec["root"]), KINDS) for key, change in changes.items()}
    for dataset in mixture.datasets:
        export_cache(made["concat"][f"tokens/{dataset.name}"], spec["cache"], task_name(dataset.name))
    return {key: str(paths[f"mixtures/{mixture.name}"]) for key, paths in made.items()}


if __name__ == "__main__":
    sys.exit(main({"input_path": run}, side))
