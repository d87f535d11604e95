"""Tokenization end to end, JSON lines to a committed store, beside SeqIO's `cache_tasks` on Beam: same text, same vocabulary.

Ours are the flow's own download and tokenization steps with their hashes, checks and commits, in a process of their own; the
peer is `seqio_cache_tasks` with the DirectRunner. CPU-seconds are of the whole process tree, start-up and imports included.
There is no result unless both have the same ids document by document.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beam
import numpy as np
from corpus import Corpus, Missing, corpus, packaged_corpus, sentencepiece_model
from data_run import corpus_mixture, make
from measure import OURS, bar, child, compare, interleave, main, process_tree

UNITS = {"mb_per_cpu_s": "MB / CPU-second", "cpu_s": "CPU-seconds", "wall_s": "seconds", "peak_rss_mib": "peak RSS, MiB"}
BAR = 10.0


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Measures both sides by turns. Raises RuntimeError where ids differ."""
    what = "download and tokenization steps (ours) beside seqio_cache_tasks on Beam's DirectRunner"
    result: dict[str, Any] = {"what": what, "packages": ["seqio", "tensorflow", "sentencepiece", "gigatoken", "prefect"]}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if quick and not beam.environment_is_made():
                raise Missing("Beam's environment is not made; a run without --quick makes it")
            python = beam.environment()
            text = packaged_corpus(Path(temporary)) if quick else corpus()
            model = sentencepiece_model()
        except Missing as missing:
            return result | {"skipped": str(missing)}
        spec = {
            "files": {name: [str(file) for file in files] for name, files in text.files.items()},
            "text_bytes": text.text_bytes,
            "model": str(model),
            "python": str(python),
            "output": temporary,
        }
        measured = interleave(__file__, rounds, **spec)
        same = child(__file__, side="compare", **spec)
    if same["ours"] != same["theirs"]:
        raise RuntimeError(f"the ids differ: {same}")
    notes = text.notes() | {"equal documents": str(same["documents"]), "tokens": str(same["tokens"])}
    metrics = compare(measured, UNITS)
    case = {"case": "SentencePiece, 32,000 pieces", "rounds": rounds, "notes": notes, "metrics": metrics}
    held = bar("times SeqIO's MB per CPU-second", metrics["mb_per_cpu_s"]["ratio"], at_least=BAR)
    return result | {"cases": [case]} | ({} if quick else {"bars": [held]})


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """One child process: it starts the process that does the work and measures it, does our work, or compares what both made."""
    if spec["side"] == "steps":
        make(corpus_mixture(_corpus(spec), _tokenizer(spec)), Path(spec["root"]))
        return {}
    if spec["side"] == "compare":
        return compare_ids(spec)
    # each run starts from nothing; what the last one made stays for the comparison
    output = Path(tempfile.mkdtemp(dir=spec["output"], prefix=f"{spec['side']}-"))
    if spec["side"] == OURS:
        work = {**spec, "side": "steps", "root": str(output)}
        measured = process_tree([sys.executable, __file__, "--child", json.dumps(work)])
    else:
        files = json.dumps([file for files in spec["files"].values() for file in files])
        variables = {"SEQIO_TEXT_FILES": files, "SEQIO_TEXT_MODEL": spec["model"], "PYTHONPATH": str(Path(__file__).parent)}
        measured = process_tree(beam.cache_command(Path(spec["python"]), output), **variables)
    return {"mb_per_cpu_s": spec["text_bytes"] / 1e6 / measured["cpu_s"], **measured}


def _corpus(spec: dict[str, Any]) -> Corpus:
    files = {name: tuple(map(Path, files)) for name, files in spec["files"].items()}
    return Corpus(files=files, documents=0, text_bytes=spec["text_bytes"], sha256="")


def _tokenizer(spec: dict[str, Any]) -> Any:
    from tasks.vocabularies import SentencePieceFile

    return SentencePieceFile(path=spec["model"])


def compare_ids(spec: dict[str, Any]) -> dict[str, Any]:
    """What both sides made, without BOS and EOS: a digest over all documents' digests in order of these, and the numbers.

    Beam writes documents in an order of its own, so they are compared as a multiset.
    """
    newest = {side: max(Path(spec["output"]).glob(f"{side}-*"), key=lambda path: path.stat().st_mtime) for side in ("ours", "peer")}
    ours, theirs = (Counter(map(_digest, ids(newest[side]))) for side, ids in (("ours", our_ids), ("peer", their_ids)))
    tokens = sum(len(ids) for ids in our_ids(newest["ours"]))
    return {"ours": _all(ours), "theirs": _all(theirs), "documents": ours.total(), "their documents": theirs.total(), "tokens": tokens}


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).digest()


def _all(documents: Counter[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(documents.elements()))).hexdigest()


def our_ids(root: Path) -> Iterator[np.ndarray]:
    """Every document of our stores, BOS and EOS taken off."""
    from model.token_store import TokenStore

    for path in sorted((root / "tokens").iterdir()):
        store = TokenStore.open(path)
        for split in store.splits.values():
            for index in range(split.num_documents):
                yield split.document(index)[0 if store.bos_id is None else 1 : -1]


def their_ids(root: Path) -> Iterator[np.ndarray]:
    """Every document of SeqIO's cache."""
    import tensorflow as tf

    files = sorted(map(str, root.rglob("train.tfrecord-*")))
    for record in tf.data.TFRecordDataset(files).as_numpy_iterator():
        yield np.asarray(tf.train.Example.FromString(record).features.feature["targets"].int64_list.value, np.int32)


if __name__ == "__main__":
    sys.exit(main({"tokenization": run}, side))
