"""Results of one part of the benchmark: written cell by cell, so that a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem_bench.conditions import conditions


class Results:
    """The JSON file of one part: conditions, settings, and a cell for each thing measured.

    Cells of an earlier run are kept only if conditions and settings are the same: figures of two
    machines, or of two states of the code, are never mixed.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.conditions = conditions()
        self.cells: dict[str, Any] = {}
        self.dropped: list[str] = []
        if path.exists():
            self._go_on()

    def _go_on(self) -> None:
        earlier = read(self.path)
        now = {**self.conditions, **_jsonable(self.settings)}
        before = {**earlier["conditions"], **earlier["settings"]}
        self.dropped = sorted(name for name in now | before if now.get(name) != before.get(name))
        if not self.dropped:
            self.cells = earlier["cells"]

    def __contains__(self, key: str) -> bool:
        return key in self.cells

    def put(self, key: str, cell: Any) -> None:
        """Adds a cell and writes the file; it is whole on disk at any moment."""
        self.cells[key] = _jsonable(cell)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(self._text(), encoding="utf-8")
        scratch.rename(self.path)

    def _text(self) -> str:
        """One line for each cell, so that a diff shows which ones changed."""
        cells = ",\n".join(f"  {json.dumps(k)}: {json.dumps(c)}" for k, c in self.cells.items())
        return (
            f'{{\n "conditions": {json.dumps(self.conditions)},\n'
            f' "settings": {json.dumps(self.settings)},\n "cells": {{\n{cells}\n }}\n}}\n'
        )


def read(path: Path) -> dict[str, Any]:
    """A file of results, with the keys `conditions`, `settings` and `cells`.

    Raises:
        ValueError: it is something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not {"conditions", "settings", "cells"} <= results.keys():
            raise ValueError("keys are missing")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} doesn't hold results ({error}): remove it") from error
    return dict(results)


def _jsonable(value: Any) -> Any:
    """The value as it comes back from a file."""
    return json.loads(json.dumps(value))
