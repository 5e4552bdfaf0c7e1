"""The tables of docs/configuration.md say what the code has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tandem import EngineConfig
from tandem.drafter_config import DRAFTER_TYPES, DrafterConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "docs" / "configuration.md"


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the tables below a heading, as cells, without the rows of titles."""
    (section,) = re.findall(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL
    )
    rows = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    assert rows, f"{page} has no table below {heading!r}"
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def name_of(cell: str) -> str:
    (name,) = re.findall(r"`(\w+)`", cell)
    return name


def defaults(cls: Any) -> dict[str, object]:
    """Field -> its default, None where there is none."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
    }


def shown(default: object) -> str:
    """A default as the tables show it."""
    if isinstance(default, str):
        return f"`{default}`"
    return str(default).lower() if isinstance(default, bool) else f"{default:g}"


def test_every_key_of_model_json() -> None:
    rows = {name_of(key): default for key, default, _ in table(CONFIGURATION, "model.json")}
    fields = defaults(EngineConfig)
    assert sorted(rows) == sorted(fields)
    plain = {name: value for name, value in fields.items() if isinstance(value, (str, int, float))}
    assert {name: rows[name] for name in plain} == {
        name: shown(value) for name, value in plain.items()
    }


def test_every_setting_of_a_drafter() -> None:
    rows = {name_of(row[0]): row[1:] for row in table(CONFIGURATION, "Drafters")}
    fields = defaults(DrafterConfig)
    assert sorted(rows) == sorted(fields.keys() - {"name"})
    for name, (types, default, _) in rows.items():
        assert types == "all" or set(re.findall(r"`(\w+)`", types)) <= set(DRAFTER_TYPES)
        if fields[name] is not None:
            assert default == shown(fields[name])


def test_every_type_of_drafter() -> None:
    (row,) = [row for row in table(CONFIGURATION, "Drafters") if name_of(row[0]) == "type"]
    assert set(re.findall(r"`(\w+)`", row[3])) == set(DRAFTER_TYPES)


def test_every_parameter_of_config_pbtxt() -> None:
    code = (ROOT / "python_backend" / "model.py").read_text()
    read = re.findall(r'_parameter\(args, "(\w+)"', code)
    assert sorted(name_of(row[0]) for row in table(CONFIGURATION, "config.pbtxt")) == sorted(read)


def test_a_missing_table_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("## Drafters\n\nNone.\n")
    with pytest.raises(AssertionError, match="no table"):
        table(page, "Drafters")
