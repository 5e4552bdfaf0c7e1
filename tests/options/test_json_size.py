"""JSON is refused by how much it holds, not by what is written in its texts."""

from __future__ import annotations

import json

import pytest

from tandem_options import OptionError
from tandem_options.json_size import check_json

MANY = 70_000


@pytest.mark.parametrize(
    "text",
    [
        "[" * MANY,
        json.dumps([1] * MANY),
        json.dumps({str(number): 1 for number in range(MANY)}),
        json.dumps([{"role": "user", "content": "a"}] * MANY),
        json.dumps(["a,[{"] * MANY),
    ],
)
def test_many_values_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="messages holds more than 65536 values"):
        check_json("messages", text)


@pytest.mark.parametrize(
    "text", ["a,[{" * MANY, '\\",' * MANY, '"' * MANY + "," * MANY, "\\" * MANY + "," * MANY]
)
def test_long_texts_are_not(text: str) -> None:
    check_json("messages", json.dumps([{"role": "user", "content": text}] * 3))
