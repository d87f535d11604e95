"""The tokenization step: a dataset's files become a token store, shard by shard, as mapped Prefect tasks or through SeqIO."""

from __future__ import annotations

import errno
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from model.durable import write_json
from model.token_writer import LEDGER_SCHEMA
from model.vocabularies.vocabulary import Vocabulary
from tasks.artifacts import Artifact
from tasks.caching import run_logger, step_task
from tasks.children import ChildFailed, ChildStopped, run_child, stopping
from tasks.data_steps import RawFiles, RegisteredTask, TfdsTask, Tokenization
from tasks.download import FILES, naming_originals, raw_files
from tasks.fingerprints import fingerprint
from tasks.manifests import read_manifest
from tasks.progress import StepProgress
from tasks.seqio_bridge.tokenization_spec import TokenizationSpec
from tasks.shard_runners import run_mapped
from tasks.shard_tokenizer import SKIPPED, ShardJob, ShardResult, Stopped, StoreSpec, splits_of, store_writer, write_shard
from tasks.sources import DataError
from tasks.steps import Step
from tasks.tokenize_config import TokenizeConfig

_WORKER = "tasks.seqio_bridge.tokenize_worker"
_SPEC = ".tokenize.json"
# A file is a shard, but a corpus of a million small files must not become a million tasks.
MAX_SHARDS = 4096
# One at a time: each child holds TensorFlow's 700 MB, and a laptop has little more to give.
_one_child = threading.Lock()


def tokenize_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> dict[str, Any]:
    """Writes the shards of `step` into `directory`; those that are there with their hashes are kept.

    The bytes written depend neither on how many workers there are, nor on how often the step was killed on the way.
    Raises DataError for text that cannot be used, and for shards that failed on every try, naming them all, when the others
    are done; OSError where the disk is full or closed; ChildFailed where SeqIO's process died; ChildStopped when told to stop.
    """
    tokenizer = Path(inputs[-1].path).absolute()
    vocabulary = Vocabulary.open(tokenizer)
    config = step.config
    if isinstance(config, Tokenization):
        counts = _tokenize_files(step, config, directory, Path(inputs[0].path).absolute(), tokenizer, vocabulary.digest)
        loss_mask = config.reading.answers is not None
    else:
        assert isinstance(config, RegisteredTask | TfdsTask)
        counts, loss_mask = _run_seqio(step, config, directory, tokenizer)
    _remove_other_shards(directory, counts)
    stats = store_writer(directory, vocabulary, loss_mask=loss_mask).stats(counts)
    if not stats["documents"]:
        raise DataError(f"dataset {step.name!r} has no document: its files hold only empty or skipped ones; add text to it")
    return stats


def shard_jobs(reading_key: str, files: Sequence[Path], digests: Sequence[str], sizes: Sequence[int]) -> list[ShardJob]:
    """A job for each file, or for each run of files where there are more than MAX_SHARDS.

    Its key is made of everything its output depends on and nothing else: `reading_key` and the contents, in order.
    """
    each = -(-len(files) // MAX_SHARDS)
    starts = range(0, len(files), each)
    return [
        ShardJob(
            shard=number,
            of=len(starts),
            key=fingerprint([LEDGER_SCHEMA, reading_key, *digests[start : start + each]]),
            files=tuple(map(str, files[start : start + each])),
            source_bytes=sum(sizes[start : start + each]),
        )
        for number, start in enumerate(starts)
    ]


def _tokenize_files(step: Step, config: Tokenization, directory: Path, raw: Path, tokenizer: Path, digest: str) -> dict[str, int]:
    raw_config = step.upstream[0].config
    assert isinstance(raw_config, RawFiles)
    files = raw_files(raw, raw_config)
    manifest = read_manifest(raw)
    assert manifest is not None, "inputs are verified before a body runs"
    entries = {raw / entry.path: entry for entry in manifest.files}
    reading_key = fingerprint([config.reading.identity(), digest])
    jobs = shard_jobs(reading_key, files, [entries[file].digest for file in files], [entries[file].bytes for file in files])
    execution = config.execution
    spec = StoreSpec(
        directory=str(directory.absolute()),
        tokenizer=str(tokenizer),
        digest=digest,
        reading=config.reading,
        source_root=str(raw / FILES),
        accelerator=execution.accelerator,
    )
    with naming_originals(files, raw_config):
        _map(step.name, spec, jobs, execution)
    return {split: len(jobs) for split in splits_of(config.reading)}


def _map(name: str, spec: StoreSpec, jobs: Sequence[ShardJob], execution: TokenizeConfig) -> None:
    """Runs every shard, the others too where one fails. Raises DataError, OSError or ChildStopped as the step's body does."""
    logger = run_logger()
    failures: dict[int, BaseException] = {}
    documents = tokens = kept = 0
    skipped: Counter[str] = Counter()
    places: list[str] = []
    with StepProgress(f"tokenize {name}", sum(job.source_bytes for job in jobs)) as progress:
        for job, outcome in run_mapped(tokenize_shard, spec, jobs, execution):
            if isinstance(outcome, ShardResult):
                documents, tokens, kept = documents + outcome.documents, tokens + outcome.tokens, kept + outcome.kept
                skipped.update(outcome.skipped)
                places += outcome.places
                if outcome.warning:
                    logger.warning("%s shard %d of %d: %s", name, job.shard, job.of, outcome.warning)
            else:
                failures[job.shard] = outcome
            progress.advance(job.source_bytes, f"{documents:,} documents, {tokens:,} tokens")
    if stopping():
        raise ChildStopped(
            f"tokenizing {name} was stopped: run the same command again, it goes on after the {len(jobs)} shards' finished ones"
        )
    if failures:
        raise _failure(name, failures, jobs)
    if skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
        where = f"; the first of them: {'; '.join(places[:3])}" if places else ""
        logger.warning(
            "%s: %d bad documents skipped (%s), listed in %s/%s%s", name, skipped.total(), reasons, spec.directory, SKIPPED, where
        )
    logger.info("%s: %d documents, %d tokens in %d shard(s), %d of them kept", name, documents, tokens, len(jobs), kept)


def _failure(name: str, failures: Mapping[int, BaseException], jobs: Sequence[ShardJob]) -> Exception:
    """One error for all shards that failed, as what the first one is."""
    first = next(iter(failures.values()))
    full = next((error for error in failures.values() if isinstance(error, OSError) and error.errno == errno.ENOSPC), None)
    if full is not None:
        left = sum(jobs[shard].source_bytes for shard in failures)
        free = shutil.disk_usage(Path(jobs[0].files[0]).parent).free
        return OSError(
            errno.ENOSPC,
            f"{full.strerror}: {len(failures)} of the {len(jobs)} shards of {name!r} are left, which need about {left:,} bytes "
            f"(as much as their source files), and {free:,} are free",
        )
    if len(jobs) == 1 and isinstance(first, DataError | OSError):
        return first
    lines = "\n".join(f"  shard {shard} of {len(jobs)}: {error}" for shard, error in sorted(failures.items()))
    others = len(jobs) - len(failures)
    message = f"{len(failures)} of the {len(jobs)} shards of dataset {name!r} failed; the other {others} are kept:\n{lines}"
    if isinstance(first, OSError) and first.errno is not None:
        return OSError(first.errno, message)
    return DataError(message)


def _worth_a_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """Bad text stays bad and a full disk full; what else fails, a worker or a disk that hiccups, is tried again."""
    error = state.result(raise_on_failure=False)
    return not (isinstance(error, ValueError | Stopped) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS)))


@task(
    name="tokenize-shard",
    task_run_name="shard {job.shard} of {job.of}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retry_condition_fn=_worth_a_retry,
    retry_delay_seconds=1,
    log_prints=False,
)
def tokenize_shard(spec: StoreSpec, job: ShardJob) -> ShardResult:
    """One shard as a mapped task: on a thread, a process or another machine that sees the same directories."""
    return write_shard(spec, job, stopping)


def _remove_other_shards(store: Path, counts: Mapping[str, int]) -> None:
    """Removes shards of another number of shards, which a registered task with changed files can leave."""
    for split, count in counts.items():
        for directory in (store / split).glob("shard-*-of-*"):
            if not directory.name.endswith(f"-of-{count:05d}"):
                shutil.rmtree(directory)
    for file in (store / SKIPPED).glob("shard-*-of-*.txt"):
        if not file.stem.endswith(tuple(f"-of-{count:05d}" for count in counts.values())):
            file.unlink()


def _run_seqio(step: Step, config: RegisteredTask | TfdsTask, directory: Path, tokenizer: Path) -> tuple[dict[str, int], bool]:
    """Runs the process in which SeqIO reads and preprocesses; how many shards each split has, and whether they have a loss mask."""
    spec = TokenizationSpec(
        store=str(directory.absolute()),
        tokenizer=str(tokenizer),
        key=step.fingerprint,
        registered=config if isinstance(config, RegisteredTask) else None,
        tfds=config if isinstance(config, TfdsTask) else None,
    )
    path = directory / _SPEC
    write_json(path, spec.model_dump(mode="json"))
    error: dict[str, Any] = {}
    shards: dict[str, Any] = {}
    run_logger().info(
        "%s is read through SeqIO, in a process of its own%s", step.name,
        f"; TFDS {config.name} is downloaded and prepared where it is not yet" if isinstance(config, TfdsTask) else "",
    )  # fmt: skip
    with StepProgress(f"tokenize {step.name}", None) as progress:

        def on_event(event: dict[str, Any]) -> None:
            if event.get("event") == "error":
                error.update(event)
            elif event.get("event") == "shards":
                shards.update(event)
            elif event.get("event") in ("shard", "progress"):
                done = f"{event['documents']:,} documents, {event['tokens']:,} tokens"
                progress.advance(0, f"{event['split']} shard {event['shard'] + 1} of {event['of']}: {done}")

        try:
            with _one_child:
                run_child(_WORKER, [str(path.absolute())], on_event)
        except ChildFailed as failed:
            if error.get("kind") == "data":
                raise DataError(str(failed)) from None
            raise
    return shards["counts"], bool(shards.get("loss_mask"))


tokenize = step_task(description="Tokenize a dataset")(tokenize_body)
