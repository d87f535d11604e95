"""What identifies a step of a run: its kind, name, configuration, upstream steps and code version.

A step is plain data. Nothing here runs it, and nothing here imports the orchestrator, so a plan is cheap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from model.config_base import Config
from tasks.artifact_store import artifact_store
from tasks.fingerprints import canonical_value, differences
from tasks.manifests import Manifest, check, identity_fingerprint, read_manifest
from tasks.places import Place, place_of

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_SHORT = 16


@dataclass(frozen=True, eq=False)
class Step:
    """One cached step. Two steps with equal fingerprints produce the same artifact, and compare equal.

    kind: the family, which is also the directory's name, such as "tokens".
    name: chosen by a person, at most 64 letters, digits, dots, dashes and underscores, with no dot in front.
    config: its identity fields decide the result; its runtime fields do not.
    upstream: the steps whose artifacts are this step's inputs, in the order the body gets them.
    code_version: raised by hand when the code changes what it produces from the same configuration.
    subdirectory_of: places this step's artifact inside that step's directory, at `{directory}/{kind}`.
    """

    kind: str
    name: str
    config: Config
    upstream: tuple[Step, ...] = ()
    code_version: str = "1"
    subdirectory_of: Step | None = None

    def __post_init__(self) -> None:
        for field, value in (("kind", self.kind), ("name", self.name)):
            if not _NAME.fullmatch(value):
                raise ValueError(
                    f"a step's {field} is {value[:80]!r}: it names a directory, so use 1 to 64 letters, digits, '.', '_' or '-', "
                    "with no dot in front"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Step):
            return NotImplemented
        return self.fingerprint == other.fingerprint and self.subdirectory_of == other.subdirectory_of

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (64 hexadecimal digits) of everything that decides the result; no path, run id or secret among it."""
        upstream = [step.fingerprint for step in self.upstream]
        return identity_fingerprint(self.kind, self.name, self.config, upstream, self.code_version)

    def directory(self, root: str | Place) -> Place:
        """Where the artifact lies: `{root}/{kind}/{name}-{fingerprint[:16]}`, or inside the step it is a subdirectory of."""
        if self.subdirectory_of is not None:
            return self.subdirectory_of.directory(root) / self.kind
        return place_of(root) / self.kind / f"{self.name}-{self.fingerprint[:_SHORT]}"

    def is_committed(self, root: str | Place, *, hashes: bool = False) -> bool:
        """Whether the artifact is there with the sizes (and, with `hashes`, the contents) that its manifest states."""
        return not check(self.directory(root), self.fingerprint, hashes=hashes)

    def closest_earlier(self, root: str | Place) -> Manifest | None:
        """The newest committed artifact of the same kind and name with another fingerprint, or None."""
        newest: tuple[int, Manifest] | None = None
        for directory in self._sibling_directories(root):
            manifest = read_manifest(directory)
            if manifest is None or not self._is_earlier(manifest):
                continue
            try:
                written = artifact_store(directory).manifest_written()
            except FileNotFoundError:
                continue  # discarded by another run since it was read
            if newest is None or written > newest[0]:
                newest = (written, manifest)
        return None if newest is None else newest[1]

    def _sibling_directories(self, root: str | Place) -> Iterator[Place]:
        owner = self.subdirectory_of or self
        pattern = re.compile(f"{re.escape(owner.name)}-[0-9a-f]{{{_SHORT}}}")
        for directory in artifact_store(place_of(root) / owner.kind).children():
            if pattern.fullmatch(directory.name):
                yield directory if self.subdirectory_of is None else directory / self.kind

    def explain_miss(self, root: str | Place) -> str:
        """Why the step has to run: it never did, a named field changed, or its files are damaged; "" when nothing is wrong.

        Looks at sizes only, so it is quick enough for a plan.
        """
        directory = self.directory(root)
        store = artifact_store(directory)
        if store.has_manifest():
            # What lies inside another step's directory has no fingerprint in its path: an earlier one of it is in the same place.
            if self.subdirectory_of is not None and (found := read_manifest(directory)) is not None and self._is_earlier(found):
                return "; ".join(self._changes_since(found, root))
            damages = check(directory, self.fingerprint, hashes=False)
            return f"its files are damaged: {'; '.join(map(str, damages))}" if damages else ""
        if reason := store.discarded_reason():
            return reason
        started = store.is_started()
        if (earlier := self.closest_earlier(root)) is not None:
            reasons = self._changes_since(earlier, root)
            return "; ".join([*reasons, "continues an unfinished run"] if started else reasons)
        return "an earlier run of this step did not finish: it continues" if started else "first run of this step"

    def _is_earlier(self, manifest: Manifest) -> bool:
        return (manifest.kind, manifest.name) == (self.kind, self.name) and manifest.fingerprint != self.fingerprint

    def _changes_since(self, earlier: Manifest, root: str | Place) -> list[str]:
        lines = self._own_changes(earlier) + self._upstream_changes(earlier, root)
        return lines or ["the order of its inputs changed"]

    def _own_changes(self, earlier: Manifest) -> list[str]:
        lines = differences(earlier.config, canonical_value(self.config))
        if earlier.code_version != self.code_version:
            lines.append(f"code_version: {earlier.code_version} -> {self.code_version}")
        return lines

    def _upstream_changes(self, earlier: Manifest, root: str | Place) -> list[str]:
        """What changed among the inputs, each cause once and at its root, however many inputs it came through."""
        lines: dict[str, None] = {}
        for step in self.upstream:
            if step.fingerprint in earlier.upstream:
                continue
            older = _manifest_among(step, earlier.upstream, root)
            own = step._own_changes(older) if older else []
            further = step._upstream_changes(older, root) if older else []
            if own or not further:
                lines[f"rebuilt because {step.kind}/{step.name} changed" + (f" ({'; '.join(own)})" if own else "")] = None
            lines.update(dict.fromkeys(further))
        removed = len(earlier.upstream) - len(self.upstream)
        if removed > 0:
            lines[f"rebuilt because {removed} of its inputs were removed"] = None
        return list(lines)


def _manifest_among(step: Step, fingerprints: list[str], root: str | Place) -> Manifest | None:
    """The committed artifact of the same kind and name as `step` whose fingerprint is one of `fingerprints`."""
    for directory in step._sibling_directories(root):
        manifest = read_manifest(directory)
        if manifest is not None and manifest.fingerprint in fingerprints and (manifest.kind, manifest.name) == (step.kind, step.name):
            return manifest
    return None
