"""The SeqIO task that the benchmarks give to SeqIO's own tools: text of JSON lines, tokenized, EOS appended at read time.

Imported where SeqIO is, also in Beam's environment, so it needs nothing else. The environment says SEQIO_TEXT_FILES, a JSON
list of files, and SEQIO_TEXT_MODEL, a SentencePiece model.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import seqio
import tensorflow as tf

NAME = "seqio_text_task"


def parse(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Lines to `{"targets": text}`. TensorFlow has no JSON reader, so this is Python inside the graph, as in everyone's tasks."""

    def text_of(line: bytes) -> bytes:
        return json.loads(line)["text"].encode()

    def parse_line(line: tf.Tensor) -> dict[str, tf.Tensor]:
        text = tf.numpy_function(text_of, [line], tf.string, stateful=False)
        return {"targets": tf.ensure_shape(text, ())}  # numpy_function forgets the shape, and the tokenizer asks for it

    return dataset.map(parse_line, num_parallel_calls=tf.data.AUTOTUNE)


_source: Any = seqio.TextLineDataSource({"train": json.loads(os.environ["SEQIO_TEXT_FILES"])})
seqio.TaskRegistry.add(
    NAME,
    source=_source,
    preprocessors=[
        parse,
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos,
    ],
    output_features={"targets": seqio.Feature(seqio.SentencePieceVocabulary(os.environ["SEQIO_TEXT_MODEL"]), add_eos=True)},
)
