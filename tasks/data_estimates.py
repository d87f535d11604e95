"""How many tokens source files will give, before they are read: only the order of magnitude is meant, and nothing is refused for it."""

from __future__ import annotations

from pathlib import Path, PurePath

from tasks.data_steps import RawFiles
from tasks.mixture_config import Chat, PromptCompletion, Reading
from tasks.sources.local_files import is_local
from tasks.sources.source_file import SourceFile
from tasks.vocabularies import ByteTokenizer, Tokenizer

# English text gives 3 to 4.5 bytes a token with the usual vocabularies, code less.
_BYTES_PER_TOKEN = 4.0
# How much text a byte of a file holds. By the sizes and tokens that publishers give: DCLM 2.2 and SlimPajama 2.8 by Zstandard,
# Dolma 2.7 by gzip, FineWeb 1.5 and SlimPajama-6B 1.7 as parquet.
_EXPANSION = {".gz": 2.5, ".zst": 2.5, ".zstd": 2.5, ".bz2": 3.5, ".xz": 3.5}
_PARQUET_EXPANSION = 1.6
# Footers of so many files, spread evenly, stand for all.
_FOOTERS = 8


def bytes_per_token(tokenizer: Tokenizer) -> float:
    """About how much text a token of it stands for; of bytes, exactly."""
    return 1.0 if isinstance(tokenizer, ByteTokenizer) else _BYTES_PER_TOKEN


def source_bytes(config: RawFiles) -> int | None:
    """Bytes of the source files, as far as servers tell or the dataset declares."""
    sizes = [file.bytes for file in config.files if file.bytes is not None]
    return sum(sizes) if len(sizes) == len(config.files) else config.source_bytes


def text_bytes(config: RawFiles, reading: Reading) -> float | None:
    """About how many bytes of text the files hold, decompressed; None where nothing tells. Reads footers of local parquet files."""
    total = source_bytes(config)
    if total is None or not config.files:
        return total
    parquet = [file for file in config.files if _is_parquet(file, reading)]
    in_parquet = _parquet_expansion(parquet, reading) if parquet else 0.0
    chosen = {file.name for file in parquet}
    factors = [in_parquet if file.name in chosen else _EXPANSION.get(_suffix(file), 1.0) for file in config.files]
    sizes = [file.bytes for file in config.files]
    # each file by its own size or, where only the sum is known, all by the mean
    weights = [1.0 if size is None else float(size) for size in sizes] if None not in sizes else [1.0] * len(sizes)
    weight = sum(weights)
    return total * sum(factor * part for factor, part in zip(factors, weights, strict=True)) / weight if weight else 0.0


def _suffix(file: SourceFile) -> str:
    return PurePath(file.name).suffix.lower()


def _is_parquet(file: SourceFile, reading: Reading) -> bool:
    return reading.format == "parquet" or (reading.format == "auto" and _suffix(file) == ".parquet")


def _parquet_expansion(files: list[SourceFile], reading: Reading) -> float:
    """Bytes of text for each byte of the files: by the footers of some that are on this machine, else as is usual."""
    local = [file for file in files if is_local(file.location) and file.bytes]
    step = max(len(local) // _FOOTERS, 1)
    held, size = 0, 0
    for file in local[::step]:
        if (found := _text_in_parquet(Path(file.location), reading)) is not None:
            held, size = held + found, size + (file.bytes or 0)
    return held / size if held else _PARQUET_EXPANSION


def _text_in_parquet(path: Path, reading: Reading) -> int | None:
    """Bytes of the columns with text in a file, decompressed, as its footer says; None where that cannot be used.

    A column in which values repeat holds each once, and gives less here than will be read.
    """
    import pyarrow as pa  # loaded where there is parquet only
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError):
        return None  # a damaged file is named when it is read
    keys = _columns(reading)
    total = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if any(column.path_in_schema == key or column.path_in_schema.startswith(f"{key}.") for key in keys):
                total += max(column.total_uncompressed_size, 0)
    return total


def _columns(reading: Reading) -> tuple[str, ...]:
    answers = reading.answers
    if isinstance(answers, Chat):
        return (answers.messages_key,)
    if isinstance(answers, PromptCompletion):
        return answers.prompt_key, answers.completion_key
    return (reading.text_key,)
