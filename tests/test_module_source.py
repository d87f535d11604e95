"""The digest of a user's module: its own code and what it imports from beside it, without importing anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tasks.data_steps import RegisteredTask, mixture_steps
from tasks.datasets import ByteTokenizer, Mixture
from tasks.module_source import module_digest

FILES = {
    "mine.py": "import os\nfrom numpy import array\nimport helpers\nfrom shared.words import WORDS\nraise RuntimeError('was imported')\n",
    "helpers.py": "from shared import more\n",
    "other.py": "x = 1\n",
    "shared/__init__.py": "",
    "shared/words.py": "from .deep.deeper import y\nWORDS = 1\n",
    "shared/more.py": "",
    "shared/unused.py": "",
    "shared/deep/__init__.py": "from .. import more\n",
    "shared/deep/deeper.py": "import no_such_module\ny = 2\n",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.parametrize("name", FILES)
def test_what_it_imports_from_beside_it_counts_and_nothing_else(project: Path, name: str) -> None:
    first = module_digest("mine")
    assert first is not None
    assert module_digest("mine") == first
    with (project / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert (module_digest("mine") != first) == (name not in ("other.py", "shared/unused.py"))
    assert "mine" not in sys.modules


def test_of_a_package_its_own_modules_count(project: Path) -> None:
    first = module_digest("shared.words")
    (project / "helpers.py").write_text("")
    assert module_digest("shared.words") == first
    (project / "shared" / "__init__.py").write_text("z = 3")
    assert module_digest("shared.words") != first


def test_it_does_not_depend_on_where_it_lies(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module_digest("mine")
    project.rename(tmp_path / "moved")
    monkeypatch.syspath_prepend(tmp_path / "moved")
    assert module_digest("mine") == first
    # a child process finds modules in the working directory too
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "moved")
    assert module_digest("mine") == first


def test_libraries_and_this_package_are_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "site-packages"
    place.mkdir()
    (place / "installed.py").write_text("import neighbour\n")
    (place / "neighbour.py").write_text("")
    monkeypatch.syspath_prepend(place)
    first = module_digest("installed")
    (place / "neighbour.py").write_text("x = 1")
    assert module_digest("installed") == first is not None
    beside = tmp_path / "checkout"
    (beside / "model").mkdir(parents=True)
    (beside / "own.py").write_text("import model\n")
    (beside / "model" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(beside)
    first = module_digest("own")
    (beside / "model" / "__init__.py").write_text("x = 1")
    assert module_digest("own") == first is not None


def test_what_is_not_there_or_no_python_has_an_answer(project: Path) -> None:
    assert module_digest("no_such_module") is None
    assert module_digest("shared.no_such_module") is None
    assert module_digest("no.such.module") is None
    (project / "other.py").write_text("this is ( no Python")
    assert module_digest("other") is not None


def test_an_edited_preprocessor_is_another_task(project: Path) -> None:
    mixture = Mixture.model_validate(
        {
            "name": "m",
            "datasets": ({"name": "theirs", "seqio_task": "their_task", "seqio_module": "mine"},),
            "weights": {"theirs": 1.0},
            "tokenizer": ByteTokenizer(),
        }
    )
    (before,) = mixture_steps(mixture).tokens
    assert mixture_steps(mixture).tokens == (before,)
    (project / "helpers.py").write_text("from shared import more\nanother = 1\n")
    (after,) = mixture_steps(mixture).tokens
    assert isinstance(after.config, RegisteredTask)
    assert after.fingerprint != before.fingerprint
