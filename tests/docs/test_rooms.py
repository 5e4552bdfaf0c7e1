"""docs/architecture.md has the floors that are linted, and a phrase for each of the files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "python_backend" / "tandem"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def named() -> set[str]:
    """The files in the tables of the rooms, relative to the engine; folders end with a slash."""
    rooms = PAGE[PAGE.index("## Rooms") : PAGE.index("## Around the engine")]
    found = set()
    for title, table in re.findall(r"^### (.*)$([^#]*)", rooms, re.MULTILINE):
        room = title if re.fullmatch(r"\w+/", title) else ""
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
            found |= {room + name for name in re.findall(r"`([\w./]+)`", row)}
    return found


def test_every_file_of_the_engine_has_a_phrase() -> None:
    names = named()
    folders = tuple(name for name in names if name.endswith("/"))
    files = {
        path.relative_to(ENGINE).as_posix()
        for path in ENGINE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {name for name in files if not name.startswith(folders)} == names - set(folders)
    assert [name for name in folders if not (ENGINE / name).is_dir()] == []


def test_the_floors_are_those_of_the_linter() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (floors,) = [c for c in contracts["contracts"] if c.get("containers") == ["tandem"]]
    section = PAGE[PAGE.index("## Floors") : PAGE.index("## Rooms")]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert [re.findall(r"`(\w+)", row) for row in rows] == [
        re.findall(r"\w+", layer) for layer in floors["layers"]
    ]
