"""Weights stored by Hugging Face: safetensors read piece by piece, whole or straight onto the devices.

    weights = HfWeights(Path("Llama-3.2-1B"), config)
    leaves = weights.read(named_leaves({"params": abstract_params}))

Each process reads the parts that its devices hold, one at a time, so a model is never in memory twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from model.config import LlamaConfig
from model.hf_config import from_hf
from model.hf_tensors import Tensor, hf_tensors

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"

_READABLE_DTYPES = ("F64", "F32", "F16", "BF16")  # names in the safetensors header
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
_FREQUENCIES = ".rotary_emb.inv_freq"  # in old exports; the configuration determines them
# Fields that decide nothing about weights which are there already.
FREE_FIELDS = frozenset({"seq_len", "head_dim", "vocab_size", "initializer", "initializer_range", "pad_vocab_to_multiple_of"})


class StoredTensors:
    """The tensors of one directory, by their names there."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError where the directory is incomplete or damaged, or its config.json describes no model that is known."""
        self.directory = directory
        self.config = from_hf(_read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
        self._files: dict[str, Any] = {}
        for file_name, listed in _weight_files(directory).items():
            file = _open(directory / file_name)
            if listed is not None and listed != set(file.keys()):
                raise ValueError(
                    f"{directory / file_name} does not hold the tensors that {INDEX_FILE} lists: {min(listed ^ set(file.keys()))}"
                )
            self._files |= {name: file for name in file.keys() if not name.endswith(_FREQUENCIES)}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        """Whether it is stored."""
        return name in self._files

    @property
    def names(self) -> set[str]:
        """Of all tensors but what the configuration determines."""
        return set(self._files)

    def problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of that name and shape cannot be had, or None."""
        if name not in self._files:
            return f"missing tensor {name}"
        stored = self._files[name].get_slice(name)
        if tuple(stored.get_shape()) == shape and stored.get_dtype() in _READABLE_DTYPES:
            return None
        there = tuple(stored.get_shape())
        padded = name in VOCABULARY_TENSORS and there[1:] == shape[1:] and there[0] > shape[0]
        remedy = f": set model.vocab_size={there[0]}, which its padding is part of" if padded else ""
        return f"{name} is {stored.get_dtype()} {there}, and floating point {shape} is needed{remedy}"

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless exactly these tensors are stored, in their shapes."""
        for name in sorted(self.names - set(tensors)):
            if name == "lm_head.weight":
                raise ValueError(f"{self.directory}: tie_word_embeddings=true but {name} is stored: set it to false in {CONFIG_FILE}")
            raise ValueError(f"{self.directory}: unexpected tensor {name}: {CONFIG_FILE} describes another model than the weights")
        if missing := sorted(set(tensors) - self.names):
            raise ValueError(f"{self.directory}: missing tensor {missing[0]} ({len(missing)} in all): copy the whole export again")
        for name, tensor in tensors.items():
            if (problem := self.problem(name, tensor.shape)) is not None:
                raise ValueError(f"{self.directory}: {problem}: use the {CONFIG_FILE} that was saved with these weights, unquantized")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A rectangle of one tensor in its own dtype; all of it without an index. Raises ValueError where the file is damaged."""
        try:
            return np.asarray(self._files[name].get_slice(name)[index or slice(None)])
        except SafetensorError as error:
            raise ValueError(f"{self.directory}: {name} cannot be read ({error}): copy the export again") from error


class HfWeights:
    """The weights of one directory by the names of our parameters: `params/embed`, `params/layers/wq`."""

    def __init__(self, directory: Path, config: LlamaConfig) -> None:
        """`config` is the model that is to have the weights. Raises ValueError as StoredTensors does."""
        self._stored = StoredTensors(directory)
        self._parts: dict[str, list[tuple[str, Tensor]]] = {}
        for name, tensor in hf_tensors(config).items():
            if tensor.name is not None:
                ours = f"params/{tensor.name}" if tensor.layer is None else f"params/layers/{tensor.name}"
                self._parts.setdefault(ours, []).append((name, tensor))
        self.unused = sorted(self._stored.names - {name for parts in self._parts.values() for name, _ in parts})
        theirs, ours = self._stored.config.identity(), config.identity()
        changed = (name for name in ours if name not in FREE_FIELDS and theirs[name] != ours[name])
        if heads := [name for name in ("num_heads", "num_kv_heads") if theirs[name] != ours[name]]:
            told = ", ".join(f"model.{name} is {theirs[name]} there, {ours[name]} here" for name in heads)
            raise ValueError(f"{directory} has weights of other heads: {told}. Give this run the model that they were made with")
        self._other_depth = (
            f"it has {theirs['num_layers']} layers there, {ours['num_layers']} here" if theirs["num_layers"] != ours["num_layers"] else None
        )
        self.differences = [f"model.{name} is {theirs[name]!r} in its {CONFIG_FILE}, {ours[name]!r} here" for name in changed]

    def problems(self, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, str]:
        """Why some of the leaves cannot be had, by name."""
        found: dict[str, str] = {}
        for leaf in leaves:
            problems = (self._stored.problem(name, tensor.shape) for name, tensor in self._parts.get(leaf, []))
            if self._other_depth is not None and leaf.startswith("params/layers/"):
                found[leaf] = self._other_depth
            elif (problem := next(filter(None, problems), None if leaf in self._parts else "it is not stored")) is not None:
                found[leaf] = problem
        return found

    def read(self, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The leaves as float32 arrays in the given shardings."""
        return {leaf: self._leaf(self._parts[leaf], abstract) for leaf, abstract in leaves.items()}

    def _leaf(self, parts: list[tuple[str, Tensor]], abstract: jax.ShapeDtypeStruct) -> jax.Array:
        def held(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # every device holds a part
            spans = [slice(*which.indices(size)[:2]) for which, size in zip(index, abstract.shape, strict=True)]
            if parts[0][1].layer is None:
                return self._rectangle(*parts[0], spans)
            return np.stack([self._rectangle(*part, spans[1:]) for part in parts[spans[0]]])  # in the order of layers

        return jax.make_array_from_callback(abstract.shape, abstract.sharding, held)

    def _rectangle(self, name: str, tensor: Tensor, spans: list[slice]) -> np.ndarray:
        """Part of one tensor in our orientation, float32; beyond its end, where the vocabulary is padded, zeros."""
        theirs = spans[::-1] if tensor.transposed else spans
        clipped = tuple(slice(min(span.start, size), min(span.stop, size)) for span, size in zip(theirs, tensor.shape, strict=True))
        array = self._stored.read(name, clipped).astype(np.float32)
        padding = [(0, span.stop - span.start - size) for span, size in zip(theirs, array.shape, strict=True)]
        array = np.pad(array, padding) if any(after for _, after in padding) else array
        return array.T if tensor.transposed else array


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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist although {INDEX_FILE} names it: copy the whole export again") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
