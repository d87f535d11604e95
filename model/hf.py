"""A Llama in Hugging Face form, both ways: safetensors, config.json, tokenizer. Needs neither torch nor transformers.

    save_hf("out/hf", config, params, tokenizer="tokenizer.model")
    config, params = load_hf("out/hf")

It is a Llama, Mistral, Qwen 2 or Qwen 3 there, by what it has (`model.hf_architectures`). A float32 export comes back bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save

from model.config import LlamaConfig
from model.durable import durable_file, remove_temporaries, write_json
from model.hf_config import SpecialIds, to_hf
from model.hf_tensors import Tensor, hf_tensors
from model.hf_tokenizer import HfTokenizer
from model.hf_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, StoredTensors
from model.parameters import Params, param_shapes

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def save_hf(
    path: Path | str,
    config: LlamaConfig,
    params: Params,
    tokenizer: Path | str | None = None,
    *,
    max_shard_bytes: int = 2_000_000_000,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    generation_eos_token_ids: tuple[int, ...] | None = None,
) -> None:
    """Writes a directory that `transformers` loads with `from_pretrained`.

    Each file appears whole or not at all, and config.json comes last: a directory without it is an unfinished export.
    Weights of an earlier export in the same directory are removed first.

    Args:
        path: the directory; made if it does not exist.
        config: the model, `vocab_size` set.
        params: its parameters, on this process's devices or in host memory.
        tokenizer: a tokenizer directory, or a bare tokenizer file, written in the forms transformers and others read.
        max_shard_bytes: largest weights file; about twice as much host memory is used.
        dtype: how the weights are stored; anything but float32 rounds them.
        generation_eos_token_ids: what ends a generated text, in generation_config.json; None: the tokenizer's EOS.

    Raises:
        ValueError: the parameters or the Hugging Face format do not fit the configuration, or an argument is out of range.
        OSError: the directory cannot be written.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(_DTYPES)}")
    tensors = hf_tensors(config)
    _check_params(config, params)
    assert config.vocab_size is not None  # `hf_tensors` needed it
    exported = None if tokenizer is None else HfTokenizer(tokenizer, vocab_size=config.vocab_size, seq_len=config.seq_len)
    special = SpecialIds() if exported is None else exported.special
    described = to_hf(config, dtype=dtype, special=special)
    shards = _plan_shards(tensors, max_shard_bytes, _DTYPES[dtype].itemsize)

    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    _remove_earlier_export(directory)
    for file_name, names in shards.items():
        arrays = {name: tensors[name].stored(params, _DTYPES[dtype]) for name in names}
        with durable_file(directory / file_name) as file:
            file.write(save(arrays, metadata={"format": "pt"}))
    if len(shards) > 1:
        total = sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) * _DTYPES[dtype].itemsize
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if exported is not None:
        exported.write(directory)
    generation: dict[str, Any] = {f"{name}_token_id": i for name, i in special._asdict().items() if i is not None}
    if generation_eos_token_ids is not None:
        generation["eos_token_id"] = list(generation_eos_token_ids)
    write_json(directory / "generation_config.json", generation)
    write_json(directory / CONFIG_FILE, described)


def load_hf(path: Path | str) -> tuple[LlamaConfig, Params]:
    """Reads a Llama, Mistral, Qwen 2 or Qwen 3 saved by `save_hf` or by transformers.

    Returns:
        The configuration, its runtime switches at their defaults, and the parameters as float32 numpy arrays.

    Raises:
        ValueError: the directory is incomplete or damaged, is another model, or has missing or unexpected tensors
            or shapes; the message names the key and what to do.
    """
    stored = StoredTensors(Path(path))
    config, tensors = stored.config, hf_tensors(stored.config)
    stored.check(tensors)
    params = jax.tree.map(lambda array: np.zeros(array.shape, np.float32), param_shapes(config))
    for name, tensor in tensors.items():
        array = stored.read(name)
        tensor.view(params)[...] = array.T if tensor.transposed else array
    return config, params


def _check_params(config: LlamaConfig, params: Params) -> None:
    expected = {jax.tree_util.keystr(key): array.shape for key, array in jax.tree_util.tree_leaves_with_path(param_shapes(config))}
    given = {jax.tree_util.keystr(key): np.shape(array) for key, array in jax.tree_util.tree_leaves_with_path(params)}
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key) != given.get(key):
            raise ValueError(
                f"params{key} has shape {given.get(key)}, the configuration asks for {expected.get(key)}: "
                f"pass the configuration that the parameters were made with"
            )


def _plan_shards(tensors: dict[str, Tensor], max_shard_bytes: int, itemsize: int) -> dict[str, list[str]]:
    """File name -> tensors, in order, each file at most `max_shard_bytes` unless one tensor alone is larger."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: use a positive number of bytes")
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape)) * itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{index:05d}-of-{len(groups):05d}.safetensors": group for index, group in enumerate(groups, 1)}


def _remove_earlier_export(directory: Path) -> None:
    """config.json first, so that a half-removed export is not taken for a whole one."""
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    for pattern in (WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        for stale in directory.glob(pattern):
            stale.unlink()
    remove_temporaries(directory)
