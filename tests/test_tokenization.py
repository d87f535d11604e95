"""Tokenization: the store holds the tokenizer's ids, document by document, however often it was killed and whoever worked on it."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from model.token_store import TokenStore
from model.token_writer import TokenStoreWriter
from model.vocabularies.accelerated_encoder import CheckedEncoder
from model.vocabularies.vocabulary import Vocabulary
from tasks import shard_tokenizer, tokenization
from tasks.artifacts import commit
from tasks.children import ChildFailed, ChildStopped, allow_children, stop_children
from tasks.data_steps import Tokenization, mixture_steps
from tasks.datasets import ByteTokenizer, DataError
from tasks.readers.text_reader import split_of
from tasks.tokenization import shard_jobs, tokenize_body
from tasks.tokenize_config import TokenizeConfig
from tests.small_run import LINES, SmallRun, tree
from tests.synthetic_vocabulary import small_vocabulary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The inputs and one whole tokenization."""
    made = SmallRun(tmp_path_factory.mktemp("run") / "root")
    made.stats = tokenize_body(made.tokens, made.directory(made.tokens), made.inputs)  # pyright: ignore[reportAttributeAccessIssue]
    return made


def test_the_store_holds_the_tokenizers_ids_document_by_document(run: SmallRun) -> None:
    stats: dict[str, Any] = run.stats  # pyright: ignore[reportAttributeAccessIssue]
    store = TokenStore.open(commit(run.directory(run.tokens), run.tokens, stats=stats))
    texts = [line for name in sorted(LINES) for line in LINES[name]]
    processor = SentencePieceProcessor(model_proto=small_vocabulary())
    for split in ("train", "validation"):
        here = [text for text in texts if split_of(text, 0.2) == split]
        assert len(here) >= 3
        stream = store.splits[split]
        assert [stream.document(index).tolist() for index in range(stream.num_documents)] == [
            [1, *processor.encode(text), 2] for text in here
        ]
        assert stream.source_bytes == sum(len(text.encode()) for text in here)
    assert (store.vocab_size, store.bos_id, store.eos_id) == (400, 1, 2)
    assert stats["documents"] == len(texts)


def test_killed_at_random_moments_the_output_is_byte_for_byte_the_same(tmp_path: Path) -> None:
    run = SmallRun(tmp_path / "root", {f"{name}.txt": [f"document {number} of {name}" for number in range(9)] for name in "abcdefghij"})
    tokenize_body(run.tokens, run.directory(run.tokens), run.inputs)
    pickled, directory = tmp_path / "run.pickle", tmp_path / "store"
    pickled.write_bytes(pickle.dumps(run))
    directory.mkdir()
    command = [sys.executable, "-m", "tests.kill_probe", str(pickled), str(directory)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 8
    assert tree(directory) == tree(run.directory(run.tokens))


def test_finished_shards_are_kept_and_damaged_ones_made_again(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.directory(run.tokens), copy)
    read: list[str] = []
    real = shard_tokenizer.read_documents
    monkeypatch.setattr(shard_tokenizer, "read_documents", lambda path, *rest: read.append(Path(path).name) or real(path, *rest))
    stats = tokenize_body(run.tokens, copy, run.inputs)
    assert read == []
    for path in ("train/shard-00000-of-00003/tokens.bin", "validation/shard-00001-of-00003/docs.npy"):
        data = bytearray((copy / path).read_bytes())
        data[-1] ^= 1
        (copy / path).write_bytes(data)
    (copy / "train" / "shard-00000-of-00009").mkdir()
    assert tokenize_body(run.tokens, copy, run.inputs) == stats
    assert read == ["a.txt", "b.txt"]
    assert tree(copy) == tree(run.directory(run.tokens))
    assert not (copy / "train" / "shard-00000-of-00009").exists()


def test_shards_that_fail_are_all_named_at_the_end_and_the_others_are_kept(tmp_path: Path) -> None:
    made = SmallRun(tmp_path / "root", {f"{name}.jsonl": ['{"text": "fine"}'] for name in "abcde"}, format="jsonl")
    for name in ("b", "d"):
        (made.source / f"{name}.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    made = SmallRun(tmp_path / "again", {path.name: path.read_text().splitlines() for path in made.source.iterdir()}, format="jsonl")
    directory = made.directory(made.tokens)
    with pytest.raises(DataError) as failed:
        tokenize_body(made.tokens, directory, made.inputs)
    message = str(failed.value)
    assert message.startswith("2 of the 5 shards of dataset 'web' failed; the other 3 are kept:\n  shard 1 of 5: ")
    # the file that a person can mend is named, not our copy of it
    for name in ("b", "d"):
        assert f"{made.source / name}.jsonl line 2" in message
    assert "no key 'text'" in message
    assert len(list(directory.glob("train/*/shard.json"))) == 3
    assert not list(directory.rglob("*.tmp"))


def test_a_full_disk_says_how_much_is_needed(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tokens.bin")

    monkeypatch.setattr(TokenStoreWriter, "shard", full)
    size = sum(path.stat().st_size for path in run.files)
    with pytest.raises(OSError, match=rf"3 of the 3 shards of 'web' are left, which need about {size:,} bytes") as error:
        tokenize_body(run.tokens, tmp_path, run.inputs)
    assert error.value.errno == errno.ENOSPC


def test_told_to_stop_it_stops_between_shards_and_keeps_the_finished_ones(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shard_tokenizer.read_documents

    def reading(path: Path, *rest: Any) -> Any:
        if Path(path).name == "b.txt":
            stop_children()
        return real(path, *rest)

    monkeypatch.setattr(shard_tokenizer, "read_documents", reading)
    try:
        with pytest.raises(ChildStopped, match="tokenizing web was stopped: run the same command again"):
            tokenize_body(run.tokens, tmp_path, run.inputs)
    finally:
        allow_children()
    assert (tmp_path / "train" / "shard-00000-of-00003" / "shard.json").exists()
    assert not (tmp_path / "train" / "shard-00002-of-00003").exists()


def test_told_to_stop_it_stops_while_it_only_skips(tmp_path: Path) -> None:
    made = SmallRun(tmp_path / "root", {"a.jsonl": ['{"text": null}'] * 60_000}, format="jsonl", on_bad_document="skip")
    looks = iter([False, False, False])
    with pytest.raises(shard_tokenizer.Stopped):
        shard_tokenizer.write_shard(*spec_and_job(made, tmp_path), lambda: next(looks, True))
    assert not list(tmp_path.glob("store/train/*/shard.json"))


def test_a_batch_has_a_bounded_number_of_texts_however_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SmallRun(tmp_path / "root", {"a.txt": ["x"] * 150_000}, tokenizer=ByteTokenizer(), holdout=0)
    sizes: list[int] = []
    real = CheckedEncoder.encode_batch
    monkeypatch.setattr(CheckedEncoder, "encode_batch", lambda encoder, texts: sizes.append(len(texts)) or real(encoder, texts))
    result = shard_tokenizer.write_shard(*spec_and_job(made, tmp_path))
    assert (sum(sizes), result.documents) == (150_000, 150_000)
    assert max(sizes) <= 1 << 16


def test_a_text_that_cannot_be_encoded_in_bounded_memory_is_bad(tmp_path: Path) -> None:
    lines = ["before", "l" * (5 << 20), "after"]
    made = SmallRun(tmp_path / "root", {"a.txt": lines}, holdout=0, on_bad_document="skip")
    result = shard_tokenizer.write_shard(*spec_and_job(made, tmp_path))
    assert (result.documents, result.skipped) == (2, {"too_long": 1})
    assert result.places == ("a.txt document 2: too_long",)
    failing = SmallRun(tmp_path / "again", {"a.txt": lines}, holdout=0)
    with pytest.raises(
        DataError, match=r"a\.txt document 2 \(it begins with 'lll.*5,242,880 bytes.*split it, or set on_bad_document='skip'"
    ):
        shard_tokenizer.write_shard(*spec_and_job(failing, tmp_path / "again"))


def spec_and_job(made: SmallRun, place: Path) -> tuple[shard_tokenizer.StoreSpec, shard_tokenizer.ShardJob]:
    """One shard of all files, in a store of its own."""
    (place / "store").mkdir()
    digest = Vocabulary.open(made.tokenizer.path).digest
    spec = shard_tokenizer.StoreSpec(
        directory=str(place / "store"),
        tokenizer=str(made.tokenizer.path),
        digest=digest,
        reading=made.mixture.datasets[0].reading,
        source_root=str(made.files[0].parent),
    )
    return spec, shard_tokenizer.ShardJob(shard=0, of=1, key="key", files=tuple(map(str, made.files)), source_bytes=1)


def test_a_shard_is_a_file_until_there_are_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [Path(f"{number}.txt") for number in range(10)]
    digests, sizes = [str(number) for number in range(10)], list(range(10))
    jobs = shard_jobs("key", files, digests, sizes)
    assert [job.files for job in jobs] == [(str(file),) for file in files]
    assert len({job.key for job in jobs}) == 10
    monkeypatch.setattr(tokenization, "MAX_SHARDS", 4)
    grouped = shard_jobs("key", files, digests, sizes)
    assert [(job.shard, job.of, len(job.files), job.source_bytes) for job in grouped] == [
        (0, 4, 3, 3), (1, 4, 3, 12), (2, 4, 3, 21), (3, 4, 1, 9),
    ]  # fmt: skip
    assert shard_jobs("other", files, digests, sizes)[0].key != grouped[0].key


def test_what_seqios_process_says_about_data_is_a_data_error_and_the_rest_is_not(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.data_steps import RegisteredTask
    from tasks.steps import Step

    event: dict[str, Any] = {"event": "error", "message": "web.txt line 2: bad", "kind": "data"}
    step = Step(kind="tokens", name="web", config=RegisteredTask(task="t"), upstream=(run.steps.tokenizer,))

    def worker(module: str, arguments: list[str], on_event: Any) -> None:
        on_event(event)
        raise ChildFailed(event["message"])

    monkeypatch.setattr(tokenization, "run_child", worker)
    with pytest.raises(DataError, match=r"^web\.txt line 2: bad$"):
        tokenize_body(step, tmp_path, (run.tokenizer,))
    event["kind"] = "other"
    with pytest.raises(ChildFailed, match="bad"):
        tokenize_body(step, tmp_path, (run.tokenizer,))


def test_how_it_is_carried_out_is_no_part_of_its_identity(run: SmallRun) -> None:
    other = mixture_steps(run.mixture, TokenizeConfig(runner="processes", workers=7, accelerator="none", tries=1))
    assert other.tokens[0].fingerprint == run.tokens.fingerprint
    assert isinstance(other.tokens[0].config, Tokenization)
    assert other.tokens[0].config.execution.workers == 7
