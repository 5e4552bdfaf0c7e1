"""docs/security.md says what holds."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tandem_gateway.limits import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| (\d+) \|", PAGE, re.MULTILINE)
    assert rows == [(each.name.replace("_", "-"), f"{each.default:.0f}") for each in fields(Limits)]
