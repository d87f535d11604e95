"""The README's tree is the tree."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "deployments", "tasks", "model")


def test_every_file_has_its_line_and_every_line_its_file() -> None:
    tree = (CHECKOUT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    listed: list[str] = []
    places: list[str] = []
    for line in tree.strip().splitlines():
        name, _, what = line.strip().partition(" ")
        assert what.strip(), f"{name} has no word about it"
        depth = (len(line) - len(line.lstrip())) // 2
        places = [*places[:depth], name.rstrip("/")]
        assert (CHECKOUT / "/".join(places)).exists()
        listed.append("/".join(places))
    files = {path.relative_to(CHECKOUT).as_posix() for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")}
    assert len(listed) == len(set(listed))
    inner = {name for name in listed if "/" in name and name.endswith(".py")}
    assert inner == {name for name in files if not name.endswith("__init__.py")}
