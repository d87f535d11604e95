"""What artifacts ask of the place they lie in: a directory and a bucket each answer in their own way, and nobody else asks which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tasks.places import Place, place_of

if TYPE_CHECKING:
    from tasks.manifests import Damage, Manifest


class ArtifactStore(Protocol):
    """The place of one artifact, or of many below it."""

    def exists(self) -> bool:
        """Whether anything is there."""
        ...

    def children(self) -> list[Place]:
        """The places just below that can hold artifacts, by name; hidden ones are left out."""
        ...

    def has_manifest(self) -> bool:
        """Whether anything lies where the manifest belongs."""
        ...

    def manifest_data(self) -> bytes:
        """The bytes of the manifest. Raises FileNotFoundError, NotADirectoryError, or an OSError that says what is wrong."""
        ...

    def manifest_written(self) -> int:
        """A number that is greater the later the manifest was written. Raises FileNotFoundError."""
        ...

    def discarded_reason(self) -> str | None:
        """Why the manifest was discarded, or None if it was not, or has been written anew since."""
        ...

    def check_writable(self) -> None:
        """Proves that something can be written there and on this machine. Raises StorageError with the remedy."""
        ...

    def check_files(self, manifest: Manifest, *, hashes: bool, remember: bool) -> list[Damage]:
        """The files that are not as `manifest` states; see `tasks.manifests.check_files`."""
        ...

    def is_started(self) -> bool:
        """Whether a run that did not finish left something on this machine."""
        ...

    def prepare(self) -> None:
        """Makes the directory on this machine ready for the body of a step that has no manifest."""
        ...

    def publish(self, manifest: Manifest, still_owner: Callable[[], None] | None) -> None:
        """Makes the sealed files in the directory on this machine the artifact that `manifest` states, by writing it last."""
        ...

    def bring(self, manifest: Manifest) -> Path:
        """The directory of this machine that holds the files of the artifact, once they are there and are what it states."""
        ...

    def discard(self, reason: str) -> None:
        """Moves the manifest aside, so that nothing uses the artifact any more."""
        ...

    def remove(self, damages: Iterable[Damage]) -> bool:
        """Removes damaged files; whether a manifest is left that has to be discarded."""
        ...

    def empty(self) -> None:
        """Removes everything that is there and on this machine."""
        ...


def artifact_store(place: str | Place) -> ArtifactStore:
    """What is at `place`. Raises ValueError for a URL of a storage that is not built in."""
    # both know manifests, which are read through here
    from tasks.local_artifact import LocalArtifact
    from tasks.object_artifact import ObjectArtifact

    place = place_of(place)
    return LocalArtifact(place) if isinstance(place, Path) else ObjectArtifact(place)
