"""A Llama in Hugging Face form, both ways: safetensors, config.json, tokenizer. Needs neither torch nor transformers.

    save_hf("out/hf", config, params, tokenizer="tokenizer.model")
    config, params = load_hf("out/hf")

It is a Llama, Mistral, Qwen 2 or Qwen 3 there, by what it has (`model.hf_architectures`). A float32 export comes back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from model.config import LlamaConfig
from model.durable import durable_file, remove_temporaries, write_json
from model.hf_config import SpecialIds, from_hf, to_hf
from model.hf_tensors import Tensor, hf_tensors
from model.hf_tokenizer import HfTokenizer
from model.parameters import Params, param_shapes

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_READABLE_DTYPES = ("F64", "F32", "F16", "BF16")  # names in the safetensors header


def save_hf(
    path: Path | str,
    config: LlamaConfig,
    params: Params,
    tokenizer: Path | str | None = None,
    *,
    max_shard_bytes: int = 2_000_000_000,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
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
    write_json(directory / "generation_config.json", {f"{name}_token_id": i for name, i in special._asdict().items() if i is not None})
    write_json(directory / CONFIG_FILE, described)


def load_hf(path: Path | str) -> tuple[LlamaConfig, Params]:
    """Reads a Llama, Mistral, Qwen 2 or Qwen 3 saved by `save_hf` or by transformers.

    Returns:
        The configuration, its runtime switches at their defaults, and the parameters as float32 numpy arrays.

    Raises:
        ValueError: the directory is incomplete or damaged, is another model, or has missing or unexpected tensors
            or shapes; the message names the key and what to do.
    """
    directory = Path(path)
    config = from_hf(_read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
    tensors = hf_tensors(config)
    params = jax.tree.map(lambda array: np.zeros(array.shape, np.float32), param_shapes(config))
    found: set[str] = set()
    for file_name, listed in _weight_files(directory).items():
        for name, stored in _stored_tensors(directory / file_name, listed):
            # Old exports carry the rotary frequencies, which the configuration determines.
            if name.endswith(".rotary_emb.inv_freq"):
                continue
            tensor = tensors.get(name)
            if tensor is None and name == "lm_head.weight":
                raise ValueError(f"{directory}: tie_word_embeddings=true but lm_head.weight is stored: set it to false in {CONFIG_FILE}")
            if tensor is None:
                raise ValueError(f"{directory}: unexpected tensor {name}: {CONFIG_FILE} describes another model than the weights")
            if tuple(stored.get_shape()) != tensor.shape or stored.get_dtype() not in _READABLE_DTYPES:
                raise ValueError(
                    f"{directory}: {name} is {stored.get_dtype()} {tuple(stored.get_shape())}, {CONFIG_FILE} asks for floating point "
                    f"{tensor.shape}: use the {CONFIG_FILE} that was saved with these weights, unquantized"
                )
            array = np.asarray(stored[:])
            tensor.view(params)[...] = array.T if tensor.transposed else array
            found.add(name)
    missing = sorted(set(tensors) - found)
    if missing:
        raise ValueError(f"{directory}: missing tensor {missing[0]} ({len(missing)} in all): copy the whole export again")
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: {path.parent} is not a finished export, give the directory of one") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from error
    if isinstance(content, dict):
        return content
    raise ValueError(f"{path} is not a JSON object: copy it again")


def _weight_files(directory: Path) -> dict[str, set[str] | None]:
    """The weights files, each with the tensors the index lists for it (None: there is no index, take all)."""
    if (directory / WEIGHTS_FILE).exists():
        return {WEIGHTS_FILE: None}
    if not (directory / INDEX_FILE).exists():
        raise ValueError(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: save the model as safetensors")
    weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and name == Path(name).name for name in weight_map.values()):
        raise ValueError(f"{directory / INDEX_FILE}: weight_map must map tensors to files beside it: copy it again")
    files: dict[str, set[str] | None] = {}
    for name in sorted(set(weight_map.values())):
        files[name] = {tensor for tensor, file_name in weight_map.items() if file_name == name}
    return files


def _stored_tensors(path: Path, listed: set[str] | None) -> Iterator[tuple[str, Any]]:
    """(name, lazily read tensor) for everything in one weights file, after checking it against the index."""
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            if listed is not None and listed != set(names):
                raise ValueError(f"{path} does not hold the tensors that {INDEX_FILE} lists: {min(listed ^ set(names))}")
            for name in names:
                yield name, file.get_slice(name)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist although {INDEX_FILE} names it: copy the whole export again") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
