"""Text to ids in memory: our encoders beside SeqIO's own tf.data path, same documents, same vocabulary, same ids.

Three sides take turns for each vocabulary: ours with the accelerator, ours without it, and SeqIO's `tokenize` over a tf.data
dataset of the same strings. SeqIO has a SentencePiece vocabulary. Llama 3's byte pairs it gets as a `seqio.Vocabulary` of one's
own: `tokenizers` inside a numpy function; ours are opened from the file of ranks that Llama 3 was released with. There is no
result unless all sides, and the vocabulary's own library, have the same ids over the whole corpus and, for ours, over 20,000
adversarial strings.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from adversarial import adversarial_strings
from corpus import Corpus, Missing, corpus, llama3_ranks, llama3_tokenizer, packaged_corpus, sentencepiece_model
from measure import OURS, PEER, bar, child, compare, interleave, main, peak_rss_mib

Encoded = Iterator[tuple[np.ndarray, list[int]]]
REFERENCE = "reference"
UNITS = {"mb_per_cpu_s": "MB / CPU-second", "cpu_s": "CPU-seconds / MB", "wall_s": "seconds / MB", "peak_rss_mib": "peak RSS, MiB"}
# At least so many times SeqIO's MB per CPU-second: with the accelerator, without it.
BARS = {"sentencepiece": (15.0, 2.5), "llama3": (50.0, 6.0)}
STRINGS, BATCH = 20_000, 1000


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Measures both vocabularies. Raises RuntimeError where ids differ."""
    what = "encoding of text in memory (ours) beside SeqIO's tokenize over tf.data"
    result: dict[str, Any] = {"what": what, "packages": ["seqio", "tensorflow", "sentencepiece", "tokenizers", "tiktoken", "gigatoken"]}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            text = packaged_corpus(Path(temporary)) if quick else corpus()
            models = trained_models(text, Path(temporary)) if quick else full_models()
        except Missing as missing:
            return result | {"skipped": str(missing)}
        cases, bars = [], []
        for name, (ours, theirs) in models.items():
            accelerated, reference = measure(name, {"ours": str(ours), "theirs": str(theirs)}, text, rounds)
            cases += [accelerated, reference]
            bars += [
                bar(f"{case['case']}, times SeqIO's MB per CPU-second", case["metrics"]["mb_per_cpu_s"]["ratio"], at_least=bound)
                for case, bound in zip((accelerated, reference), BARS[name], strict=True)
            ]
    return result | {"cases": cases} | ({} if quick else {"bars": bars})


def full_models() -> dict[str, tuple[Path, Path]]:
    """The file of each vocabulary that we open, and the one that the library and the peer do. Raises Missing."""
    pieces = sentencepiece_model()
    return {"sentencepiece": (pieces, pieces), "llama3": (llama3_ranks(), llama3_tokenizer())}


def measure(name: str, models: dict[str, str], text: Corpus, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cases of one vocabulary, with the accelerator and without. Raises RuntimeError where ids differ."""
    spec = {"vocabulary": name, "models": models, "files": [str(file) for files in text.files.values() for file in files]}
    exact = child(__file__, side="exact", **spec)
    if exact["differing"]:
        raise RuntimeError(
            f"{name}: {len(exact['differing'])} of {STRINGS} strings get other ids than the library's: {exact['differing'][:3]}"
        )
    measured = interleave(__file__, rounds, (OURS, REFERENCE, PEER), **spec)
    for side, rows in measured.items():
        if others := {row["ids"] for row in rows} - {exact["ids"]}:
            raise RuntimeError(f"{name}: {side} has ids {others}, the library {exact['ids']}")
    notes = text.notes() | {"tokens": str(exact["tokens"]), "sha256 of all ids": exact["ids"][:16], "equal strings": str(STRINGS)}

    def case(title: str, ours: str) -> dict[str, Any]:
        metrics = compare({OURS: measured[ours], PEER: measured[PEER]}, UNITS)
        own = {OURS: measured[ours][0]["backend"], PEER: measured[PEER][0]["backend"]}
        return {"case": f"{name}, {title}", "rounds": rounds, "notes": own | notes, "metrics": metrics}

    return case("with the accelerator", OURS), case("without it", REFERENCE)


def trained_models(text: Corpus, directory: Path) -> dict[str, tuple[Path, Path]]:
    """Small vocabularies of both kinds for short runs, trained here, as `full_models` has them."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = documents([str(file) for files in text.files.values() for file in files])
    lines = [line for document in texts for line in document.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "bpe"),
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    pieces, pairs = directory / "bpe.model", directory / "tokenizer.json"
    return {"sentencepiece": (pieces, pieces), "llama3": (pairs, pairs)}


def documents(files: Iterable[str]) -> list[str]:
    """The texts of JSON lines files, in order."""
    return [json.loads(line)["text"] for file in files for line in Path(file).read_bytes().splitlines()]


def digest(parts: Iterable[np.ndarray], lengths: Iterable[int]) -> str:
    """sha256 of all ids, int32, and of how many each document has."""
    hashed = hashlib.sha256()
    for ids in parts:
        hashed.update(np.asarray(ids, np.int32).tobytes())
    hashed.update(np.fromiter(lengths, np.int64).tobytes())
    return hashed.hexdigest()


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """One child process: the library's own ids and the adversarial strings, or one side encodes the corpus."""
    texts = documents(spec["files"])
    if spec["side"] == "exact":
        return exactness(spec, texts)
    encode, backend = seqio_encoder(spec, texts) if spec["side"] == PEER else our_encoder(spec, texts)
    cpu, wall = time.process_time(), time.perf_counter()
    encoded = list(encode)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ids = digest((ids for ids, _ in encoded), (length for _, lengths in encoded for length in lengths))
    rates = {"mb_per_cpu_s": megabytes / cpu, "cpu_s": cpu / megabytes, "wall_s": wall / megabytes}
    return {**rates, "peak_rss_mib": peak_rss_mib(), "ids": ids, "backend": backend}


def our_encoder(spec: dict[str, Any], texts: list[str]) -> tuple[Encoded, str]:
    """Ids and lengths of batches of documents, by the encoder that tokenization uses, loaded before the first is asked for; its name."""
    from model.vocabularies.accelerated_encoder import CheckedEncoder
    from model.vocabularies.vocabulary import Vocabulary

    encoder = CheckedEncoder(Vocabulary.open(spec["models"]["ours"]), "auto" if spec["side"] == OURS else "none")
    encoder.encode_batch(["warm up"])
    batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
    return ((ids, lengths.tolist()) for ids, lengths in map(encoder.encode_batch, batches)), encoder.backend


def seqio_encoder(spec: dict[str, Any], texts: list[str]) -> tuple[Encoded, str]:
    """Ids and length of each document, by SeqIO's `tokenize` over a dataset of the texts; its vocabulary's name."""
    import seqio
    import tensorflow as tf
    from seqio_json_vocabulary import JsonVocabulary

    model = spec["models"]["theirs"]
    vocabulary = seqio.SentencePieceVocabulary(model) if spec["vocabulary"] == "sentencepiece" else JsonVocabulary(model)
    features = {"targets": seqio.Feature(vocabulary, add_eos=False)}
    strings: Any = {"targets": [text.encode() for text in texts]}
    dataset = tf.data.Dataset.from_tensor_slices(strings)
    dataset = seqio.preprocessors.tokenize(dataset, features, copy_pretokenized=False)
    encoded = ((example["targets"], [len(example["targets"])]) for example in dataset.as_numpy_iterator())
    return encoded, type(vocabulary).__name__


def exactness(spec: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The library's ids of the corpus, and the strings on which one of our encoders differs from the library."""
    from model.vocabularies.accelerated_encoder import CheckedEncoder
    from model.vocabularies.vocabulary import Vocabulary

    library = library_encoder(spec)
    encoded = [ids for start in range(0, len(texts), BATCH) for ids in library(texts[start : start + BATCH])]
    strings = adversarial_strings(STRINGS)
    expected = [ids.tolist() for ids in library(strings)]
    vocabulary = Vocabulary.open(spec["models"]["ours"])
    differing: set[str] = set()
    for accelerator in ("auto", "none"):
        ids, lengths = CheckedEncoder(vocabulary, accelerator).encode_batch(strings)
        ours = np.split(ids, np.cumsum(lengths)[:-1])
        differing |= {repr(text) for text, own, other in zip(strings, ours, expected, strict=True) if own.tolist() != other}
    lengths = [len(ids) for ids in encoded]
    return {"ids": digest(encoded, lengths), "tokens": sum(lengths), "differing": sorted(differing)}


def library_encoder(spec: dict[str, Any]) -> Any:
    """A function from texts to arrays of ids, by the library that the vocabulary belongs to. Text is plain text throughout."""
    if spec["vocabulary"] == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=spec["models"]["theirs"])
        return lambda texts: [np.asarray(ids, np.int32) for ids in processor.encode(texts)]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(spec["models"]["theirs"])
    tokenizer.encode_special_tokens = True
    return lambda texts: [np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


if __name__ == "__main__":
    sys.exit(main({"encoders": run}, side))
