"""The data steps of a small mixture up to its tokens, made without Prefect: what several tests begin with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tasks.artifacts import Artifact, commit
from tasks.data_steps import DataSteps, mixture_steps
from tasks.datasets import Mixture, SentencePieceFile
from tasks.download import download_body
from tasks.steps import Step
from tasks.tokenize_config import TokenizeConfig
from tasks.vocabulary import train_vocabulary_body
from tests.synthetic_vocabulary import small_vocabulary

LINES = {
    "a.txt": [f"line {number}: to be, or not to be, that is question {number * number}" for number in range(40)],
    "b.txt": [
        "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642",
        "a <s> and a </s> and <unk> <0x0A> in the text",
        "tab\there  two  spaces ",
        "one more line",
    ],
    "c.txt": ["only"],
}


class SmallRun:
    """Writes `lines` as text files, a document a line, downloads them and takes a vocabulary of 400 pieces."""

    def __init__(self, root: Path, lines: dict[str, list[str]] | None = None, tokenizer: Any = None, **dataset: Any) -> None:
        self.root = root
        self.lines = LINES if lines is None else lines
        self.source = root / "source"
        self.source.mkdir(parents=True)
        for name, texts in self.lines.items():
            (self.source / name).write_bytes("".join(f"{text}\n" for text in texts).encode())
        (root / "given.model").write_bytes(small_vocabulary())
        fields = {"name": "web", "source": str(self.source / "*"), "document": "line", "holdout": 0.2, **dataset}
        mixture = Mixture.model_validate(
            {
                "name": "mix",
                "datasets": (fields,),
                "weights": {"web": 1.0},
                "tokenizer": tokenizer or SentencePieceFile(path=str(root / "given.model")),
            }
        )
        self.mixture = mixture
        self.steps: DataSteps = mixture_steps(mixture, TokenizeConfig())
        self.tokens = self.steps.tokens[0]
        self.raw = self.made(self.steps.downloads[0], download_body)
        self.tokenizer = self.made(self.steps.tokenizer, train_vocabulary_body, *([self.raw] if self.steps.tokenizer.upstream else []))
        self.files = [Path(self.raw.path) / "files" / name for name in sorted(self.lines)]

    def directory(self, step: Step) -> Path:
        """The step's directory, made."""
        directory = step.directory(self.root)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def made(self, step: Step, body: Any, *inputs: Artifact) -> Artifact:
        """The committed artifact of a step."""
        return commit(self.directory(step), step, stats=body(step, self.directory(step), inputs))

    @property
    def inputs(self) -> tuple[Artifact, ...]:
        """Of the tokens step."""
        return self.raw, self.tokenizer


def tree(directory: Path) -> dict[str, str]:
    """The sha256 of every file below a directory that belongs to the data in it, by relative path."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "manifest.json"
    }
