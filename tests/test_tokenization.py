"""Tokenization: the store holds what SeqIO yields, document by document, however often the process was killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from model.token_store import TokenStore
from tasks import tokenization
from tasks.artifacts import Artifact, commit
from tasks.children import ChildFailed
from tasks.data_steps import DataSteps, Tokenization, mixture_steps
from tasks.datasets import DataError, Mixture, SentencePieceFile
from tasks.download import download_body
from tasks.mixture import mix_body
from tasks.text_reader import split_of
from tasks.tokenization import shard_jobs, tokenize_body
from tasks.tokenization_spec import TokenizationSpec
from tasks.vocabulary import train_vocabulary_body
from tasks.vocabulary_file import inspect_vocabulary
from tests.synthetic_vocabulary import small_vocabulary

ROOT = Path(__file__).resolve().parent.parent
LINES = {
    "a.txt": [f"line {number}: to be, or not to be, that is question {number * number}" for number in range(40)],
    "b.txt": [
        "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642",
        "a <s> and a </s> and <unk> <0x0A> in the text",
        "tab\there  two  spaces ",
        "nul \0 byte",
    ],
    "c.txt": ["only"],
}


class Run:
    """The steps of one small mixture up to the tokens, and what the probe found out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        source = root / "source"
        source.mkdir(parents=True)
        for name, lines in LINES.items():
            (source / name).write_bytes("".join(f"{line}\n" for line in lines).encode())
        (root / "given.model").write_bytes(small_vocabulary())
        mixture = Mixture.model_validate(
            {
                "name": "mix",
                "datasets": ({"name": "web", "source": str(source / "*.txt"), "document": "line", "holdout": 0.2},),
                "weights": {"web": 1.0},
                "tokenizer": SentencePieceFile(path=str(root / "given.model")),
            }
        )
        self.steps: DataSteps = mixture_steps(mixture)
        self.tokens = self.steps.tokens[0]
        download, tokenizer = self.steps.downloads[0], self.steps.tokenizer
        self.raw = self.made(download, download_body(download, self.directory(download), ()))
        self.tokenizer = self.made(tokenizer, train_vocabulary_body(tokenizer, self.directory(tokenizer), ()))
        self.files = [Path(self.raw.path) / "files" / name for name in sorted(LINES)]
        self.stats: dict[str, Any] = {}
        self.probe: dict[str, Any] = {}

    def directory(self, step: Any) -> Path:
        directory = step.directory(self.root)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def made(self, step: Any, stats: dict[str, Any]) -> Artifact:
        return commit(self.directory(step), step, stats=stats)

    def inputs(self) -> tuple[Artifact, ...]:
        return self.raw, self.tokenizer

    def spec(self) -> TokenizationSpec:
        """What the step tells its worker when no shard is there yet."""
        model = Path(self.tokenizer.path) / "tokenizer.model"
        info = inspect_vocabulary(model)
        config, raw = self.tokens.config, self.steps.downloads[0].config
        assert isinstance(config, Tokenization)
        return TokenizationSpec(
            store="",
            tokenizer=str(model),
            tokenizer_sha256=info.sha256,
            vocab_size=info.vocab_size,
            bos_id=info.bos_id,
            eos_id=info.eos_id,
            key="key",
            files=tuple(map(str, self.files)),
            reading=config.reading,
            jobs=shard_jobs(config, raw.files, info),  # pyright: ignore[reportAttributeAccessIssue]
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One real run of the step and, beside it, the probe."""
    made = Run(tmp_path_factory.mktemp("run") / "root")
    spec_file = made.root / "spec.json"
    spec_file.write_text(made.spec().model_dump_json(), encoding="utf-8")
    (made.root / "probe").mkdir()
    command = [sys.executable, "-m", "tests.tokenization_probe", str(spec_file), str(made.files[0].parent), str(made.root / "probe")]
    probe = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        made.stats = tokenize_body(made.tokens, made.directory(made.tokens), made.inputs())
        out, err = probe.communicate(timeout=120)
    finally:
        probe.kill()
    assert probe.returncode == 0, err[-3000:]
    made.probe = json.loads(out.splitlines()[-1])
    return made


def tree(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".tokenize") and path.name != "manifest.json"
    }


def stored(path: Path | Artifact) -> dict[str, list[list[int]]]:
    store = TokenStore.open(path)
    return {name: [split.document(index).tolist() for index in range(split.num_documents)] for name, split in store.splits.items()}


def test_the_store_equals_seqio_and_sentencepiece_document_by_document(run: Run) -> None:
    found = stored(commit(run.directory(run.tokens), run.tokens, stats=run.stats))
    texts = [line for name in sorted(LINES) for line in LINES[name]]
    processor = SentencePieceProcessor(model_proto=small_vocabulary())
    for split in ("train", "validation"):
        here = [number for number, text in enumerate(texts) if split_of(text, 0.2) == split]
        assert len(here) >= 3
        assert found[split] == [[1, *run.probe["seqio"][number]] for number in here]
        assert found[split] == [[1, *processor.encode(texts[number]), 2] for number in here]
    store = TokenStore.open(run.directory(run.tokens))
    assert {name: split.source_bytes for name, split in store.splits.items()} == {
        split: sum(len(text.encode()) for text in texts if split_of(text, 0.2) == split) for split in ("train", "validation")
    }
    assert (store.vocab_size, store.bos_id, store.eos_id) == (400, 1, 2)
    assert run.stats["documents"] == len(texts)
    assert run.stats["tokenizer_sha256"] == hashlib.sha256(small_vocabulary()).hexdigest()


def test_killed_at_many_moments_the_output_is_byte_for_byte_the_same(run: Run) -> None:
    assert run.probe["kills"] == 5
    killed, whole = tree(run.root / "probe" / "killed"), tree(run.directory(run.tokens))
    assert len(whole) == 18
    assert killed == whole


def test_finished_shards_are_kept_without_starting_a_process_and_damaged_ones_are_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = run.root / "copy"
    shutil.copytree(run.directory(run.tokens), copy)
    asked: list[TokenizationSpec] = []

    def worker(module: str, arguments: list[str], on_event: Any) -> None:
        asked.append(TokenizationSpec.model_validate_json(Path(arguments[0]).read_bytes()))
        raise ChildFailed("not now")

    monkeypatch.setattr(tokenization, "run_child", worker)
    assert tokenize_body(run.tokens, copy, run.inputs()) == run.stats
    assert asked == []
    for path in ("train/shard-00000-of-00003/tokens.bin", "validation/shard-00001-of-00003/docs.npy"):
        data = bytearray((copy / path).read_bytes())
        data[-1] ^= 1
        (copy / path).write_bytes(data)
    with pytest.raises(ChildFailed, match="not now"):
        tokenize_body(run.tokens, copy, run.inputs())
    assert [(job.split, job.shard) for job in asked[0].jobs] == [("train", 0), ("validation", 1)]


def test_what_the_worker_says_about_data_is_a_data_error_and_the_rest_is_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    event: dict[str, Any] = {"event": "error", "message": "web.txt line 2: bad", "kind": "data"}
    empty = run.root / "empty"
    empty.mkdir()

    def worker(module: str, arguments: list[str], on_event: Any) -> None:
        on_event(event)
        raise ChildFailed(event["message"])

    monkeypatch.setattr(tokenization, "run_child", worker)
    with pytest.raises(DataError, match=r"^web\.txt line 2: bad$"):
        tokenize_body(run.tokens, empty, run.inputs())
    event.update(kind="storage", errno=errno.ENOSPC)
    with pytest.raises(OSError, match="bad") as full:
        tokenize_body(run.tokens, empty, run.inputs())
    assert full.value.errno == errno.ENOSPC
    event["kind"] = "other"
    with pytest.raises(ChildFailed, match="bad"):
        tokenize_body(run.tokens, empty, run.inputs())


def test_datasets_are_real_seqio_tasks_and_mixtures(run: Run) -> None:
    found = run.probe["mixture"]
    assert found["names"] == ["my_mix", {"web": "my_mix.web", "wiki": "my_mix.wiki"}]
    assert found["rates"] == {"my_mix.web": 0.75, "my_mix.wiki": 0.25}
    train = stored(run.directory(run.tokens))["train"]
    assert len(found["examples"]) == 40
    assert all(example in train for example in found["examples"])
    assert found["shuffled"] == sorted(train)
    assert found["shards"] == [str(path) for path in run.files]


def test_a_task_of_seqios_registry_is_tokenized_by_name(run: Run) -> None:
    events = run.probe["events"]
    assert events[0] == {"event": "shards", "counts": {"train": 3}}
    assert [event["shard"] for event in events[1:]] == [0, 1, 2]
    assert sum(event["documents"] for event in events[1:]) == sum(map(len, LINES.values()))
    errors = run.probe["errors"]
    assert "seqio_task='nowhere' is not in SeqIO's registry" in errors["unknown"]
    assert "seqio_task='my_mix' is a mixture; name its tasks as datasets" in errors["mixture"]
    assert "seqio_module='no.such.module' cannot be imported" in errors["module"]
    assert "set mixture.tokenizer to the task's own model file" in errors["vocabulary"]
    assert "bad.txt line 2 (byte 9): byte 0xff is not UTF-8" in errors["reader"]


def test_the_mixture_names_its_stores_by_relative_paths_and_measures_entropy(run: Run) -> None:
    tokens = commit(run.directory(run.tokens), run.tokens, stats=run.stats)
    mixing = run.steps.mixture
    stats = mix_body(mixing, run.directory(mixing), (run.tokenizer, tokens, run.raw))
    value = json.loads((run.directory(mixing) / "mixture.json").read_text(encoding="utf-8"))
    component = value["components"][0]
    assert (component["name"], component["weight"], component["fingerprint"]) == ("web", 1.0, run.tokens.fingerprint)
    assert component["store"] == f"../../tokens/{run.directory(run.tokens).name}"
    assert component["splits"]["train"] == {key: run.stats["splits"]["train"][key] for key in ("documents", "tokens", "source_bytes")}
    assert stats["unigram_entropy"] == value["unigram_entropy"] == component["unigram_entropy"]
    assert 3 < stats["unigram_entropy"] < 6


def test_a_store_that_is_not_what_seqio_yields_makes_no_mixture(run: Run, tmp_path: Path) -> None:
    tokens = commit(run.directory(run.tokens), run.tokens, stats=run.stats)
    shutil.copytree(run.raw.path, tmp_path / "raw")
    for path in (tmp_path / "raw" / "files").iterdir():
        path.write_text("another text altogether\n" * 30)
    other = run.raw.model_copy(update={"path": str(tmp_path / "raw")})
    with pytest.raises(DataError, match=r"does not begin with the document that SeqIO yields for 'web'.*--force 'tokens/web'"):
        mix_body(run.steps.mixture, run.directory(run.steps.mixture), (run.tokenizer, tokens, other))


def test_the_worker_dies_with_its_parent(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    # a pipe without a writer holds the worker where it reads its spec, long before TensorFlow
    os.mkfifo(spec)
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-m', 'tasks.tokenize_worker', sys.argv[1]]); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(spec)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    writer = os.open(spec, os.O_WRONLY)  # returns when the worker has come to read, so it has asked to die with its parent
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.close(writer)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
