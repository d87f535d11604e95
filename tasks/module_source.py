"""What a module of the user's does, by its source and that of the modules it imports, told without importing any of them."""

from __future__ import annotations

import ast
import importlib
import sys
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from tasks.fingerprints import fingerprint

_CHECKOUT = Path(__file__).resolve().parent.parent
_LIBRARIES = ("site-packages", "dist-packages")
_OWN_PACKAGES = frozenset({"deployments", "flows", "model", "tasks"})


def module_digest(module: str) -> str | None:
    """The sha256 of the sources of `module` and of what it imports, directly or not, from its own package or directory.

    Other libraries are no part of it, nor are imports by computed names, or files that are no modules. Where the module's directory
    is that of all installed libraries, what lies beside it is none of its own. None where the module cannot be found.
    """
    importlib.invalidate_caches()
    top = module.partition(".")[0]
    root = _find(top, None)
    if root is None:
        return None
    own = _Own(top, root)
    sources: dict[str, str] = {}
    waiting = list(_with_parents(module))
    while waiting:
        name = waiting.pop()
        if name in sources or (found := own.find(name)) is None:
            continue
        content = _source(found)
        sources[name] = sha256(content).hexdigest()
        waiting += _imported(name, content, is_package=found.submodule_search_locations is not None)
    return fingerprint(sorted(sources.items())) if module in sources else None


class _Own:
    """Finds the modules that belong to the top-level module `top`: below it, and beside it unless that is where libraries are."""

    def __init__(self, top: str, root: ModuleSpec) -> None:
        self._known: dict[str, ModuleSpec | None] = {top: root}
        place = _place(root)
        libraries = {Path(path).resolve() for path in sysconfig.get_paths().values()}
        self._beside = None if place is None or place in libraries or place.name in _LIBRARIES else place

    def find(self, name: str) -> ModuleSpec | None:
        """The module of that name, where there is one and it belongs here."""
        if name not in self._known:
            parent, _, _ = name.rpartition(".")
            if not parent:
                self._known[name] = self._neighbour(name)
            else:
                above = self.find(parent)
                places = None if above is None else above.submodule_search_locations
                self._known[name] = None if places is None else _find(name, list(places))
        return self._known[name]

    def _neighbour(self, name: str) -> ModuleSpec | None:
        if self._beside is None or name in _OWN_PACKAGES:
            return None
        found = PathFinder.find_spec(name, [str(self._beside)])
        return found if found is not None and _place(found) == self._beside else None


def _find(name: str, path: list[str] | None) -> ModuleSpec | None:
    """Where a module is, as a child process finds it: in the working directory and the checkout first."""
    places = ["", str(_CHECKOUT), *filter(None, sys.path)] if path is None else path
    if (found := PathFinder.find_spec(name, places)) is not None:
        return found
    # installations that are edited in place bring a finder of their own
    others = (finder for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_spec"))
    return next((found for finder in others if (found := finder.find_spec(name, path, None)) is not None), None)


def _place(spec: ModuleSpec) -> Path | None:
    """The directory that a top-level module or package is in."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return None if spec.origin is None else Path(spec.origin).resolve().parent


def _source(spec: ModuleSpec) -> bytes:
    """The bytes of the module's file; none of a package without one."""
    read = getattr(spec.loader, "get_data", None)
    if spec.origin is None or read is None or not spec.has_location:
        return b""
    return read(spec.origin)


def _imported(name: str, content: bytes, *, is_package: bool) -> Iterator[str]:
    """Names that the module imports, and those that could be modules in what it imports from."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return  # compiled, or wrong, which its import will say
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{above}.{base}" if base else above
            if base:
                yield from _with_parents(base)
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
