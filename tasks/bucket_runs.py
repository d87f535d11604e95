"""A training run whose artifact lies in a bucket: what a host fetches before the trainer starts, and what it leaves there at the end.

While it goes, its checkpoints and, in each, its curves are written to the bucket by the trainer itself (`model.checkpoint`).
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path

from model.buckets import stored_files
from model.job import TrainingJob
from model.mixture_store import MIXTURE_FILE
from tasks import objects
from tasks.artifacts import ArtifactMissing, brought_here, open_artifact
from tasks.manifests import FileEntry, Manifest, load_manifest
from tasks.places import SCHEME, ObjectPath, place_of, place_of_working, working_directory
from tasks.storage import make_directory

EXPORT = "hf"
STEP_EXPORT = "hf-step-"  # of a checkpoint before the last, with its step


def bucket_of(directory: Path) -> str | None:
    """The URL of the artifact whose working directory this is; None where it is no copy of a bucket's."""
    place = place_of_working(directory.absolute())
    return str(place) if isinstance(place, ObjectPath) else None


def on_this_machine(job: TrainingJob) -> TrainingJob:
    """The job with the paths of this machine, to which what it reads was brought; as it is where nothing of it lies in a bucket.

    Raises ArtifactMissing, ArtifactDamaged, StorageError.
    """
    if job.bucket is None:
        return job
    directory = working_directory(place_of(job.bucket))
    make_directory(directory)
    mixture = job.mixture if job.mixture_bucket is None else fetch_mixture(ObjectPath.parse(job.mixture_bucket))
    return job.model_copy(update={"directory": directory, "mixture": mixture})


def fetch_mixture(place: ObjectPath, *, tokens: bool = True) -> Path:
    """The directory of this machine with the mixture at `place`, beside it its tokenizer and, with `tokens`, its token stores.

    Raises ArtifactMissing, ArtifactDamaged, StorageError.
    """
    directory = _fetched(place)
    tokenizer, *stores = _parts(place, directory)
    for part in (tokenizer, *(stores if tokens else ())):
        _fetched(part)
    return directory


def _parts(mixture: ObjectPath, directory: Path) -> list[ObjectPath]:
    """The artifacts that a mixture names: its tokenizer, then its token stores."""
    value = json.loads((directory / MIXTURE_FILE).read_text(encoding="utf-8"))
    return [_artifact_of(mixture, path) for path in (value["tokenizer"]["path"], *(part["store"] for part in value["components"]))]


def bytes_to_fetch(place: ObjectPath, directory: Path) -> int:
    """What a host brings for the mixture at `place`, whose own files are in `directory`. Raises ArtifactMissing, StorageError."""
    return sum(entry.bytes for part in _parts(place, directory) for entry in _manifest(part).files)


def model_here(path: str) -> Path:
    """`path`, or the export of the finished run that it names in a bucket, brought to this machine.

    Raises:
        ValueError: there is no export.
    """
    if not path.startswith(SCHEME):
        return Path(path)
    place = ObjectPath.parse(path)
    place = place if place.name == EXPORT or place.name.startswith(STEP_EXPORT) else place / EXPORT
    if load_manifest(place)[0] is None:
        raise ValueError(
            f"{path}: there is no export in {place}. From a bucket a finished run's export is used: give the run's directory, "
            f"{place.parent.parent.parent if place.parent.key else 'gs://bucket'}/checkpoints/NAME-..."
        )
    return _fetched(place)


def _fetched(place: ObjectPath) -> Path:
    return Path(brought_here(open_artifact(place, _manifest(place).fingerprint)).path)


def _manifest(place: ObjectPath) -> Manifest:
    manifest, reason = load_manifest(place)
    if manifest is None:
        raise ArtifactMissing(
            f"there is no artifact in {place}: its manifest {reason}. Run the same command again: it makes what is missing"
        )
    return manifest


def _artifact_of(mixture: ObjectPath, relative: str) -> ObjectPath:
    """The artifact that a path relative to the mixture leads into: as deep below the root as the mixture, `{kind}/{name}`."""
    depth = mixture.key.count("/") + 1
    parts = posixpath.normpath(f"{mixture.key}/{relative}").split("/")
    return ObjectPath(mixture.bucket, "/".join(parts[:depth]))


def send_records(job: TrainingJob, names: Iterable[str]) -> None:
    """Brings files of the run's directory into its bucket, those that are there. Raises StorageError."""
    if job.bucket is None:
        return
    place = ObjectPath.parse(job.bucket)
    for name in names:
        if (job.directory / name).is_file():
            objects.write(place / name, (job.directory / name).read_bytes(), generation=None)


def fetch_records(job: TrainingJob, names: Iterable[str]) -> None:
    """Brings files that another host sent into the run's directory, those that are there. Raises StorageError."""
    if job.bucket is None:
        return
    place = ObjectPath.parse(job.bucket)
    make_directory(job.directory)
    for name in names:
        try:
            objects.download(objects.stat(place / name), job.directory / name)
        except FileNotFoundError:
            (job.directory / name).unlink(missing_ok=True)  # what is left here is of an attempt that the bucket does not know


def stored_entries(job: TrainingJob, step: int) -> Iterator[FileEntry]:
    """The files of the checkpoint of `step`, where it lies in the bucket."""
    if job.bucket is None:
        return
    for name, file in sorted(stored_files(job.checkpoints / str(step)).items()):
        path, md5 = f"checkpoints/{step}/{name}", file.md5
        if md5 is None:
            md5 = objects.digest(objects.stat(ObjectPath.parse(job.bucket) / path), "md5")
        yield FileEntry(path=path, bytes=file.size, md5=md5)
