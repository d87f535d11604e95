"""The laws that no linter checks: file names that shadow nothing, and what may be imported where."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "tasks", "model", "deployments")
FILES = [path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")]
# All that TensorFlow and SeqIO are imported by, in child processes.
SEQIO = "tasks/seqio_bridge/"


def imports(path: Path) -> set[str]:
    """Top-level names imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CHECKOUT).as_posix())
def test_imports(path: Path) -> None:
    name = path.relative_to(CHECKOUT).as_posix()
    found = imports(path)
    if not name.startswith("model/"):
        assert not found & {"jax", "flax", "optax", "orbax"}
    else:
        assert not found & {"prefect", "tasks", "flows", "deployments"}
    if not name.startswith(SEQIO):
        assert not found & {"tensorflow", "seqio", "tensorflow_text", "tensorflow_datasets"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_hides_another_module(package: str) -> None:
    own = {path.stem for path in (CHECKOUT / package).glob("*.py")} - {"__init__"}
    assert not own & sys.stdlib_module_names
    if package == "flows":  # a script's own directory comes first on the path
        assert not own & (packages_distributions().keys() - set(PACKAGES))
