"""docs/requests.md and config.pbtxt say what the table of options says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tandem_options import ALIASES, OPTIONS, Fate, Option

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "requests.md").read_text()
TENSORS = re.findall(
    r'name: "(\w+)", data_type: TYPE_(\w+), dims: \[ (-?1) \], optional',
    (ROOT / "model_repository/tandem/config.pbtxt").read_text(),
)
# The prompt, and what holds options.
NO_OPTIONS = {"text_input", "input_ids", "messages", "tools", "sampling_parameters"}
TYPES = {
    "any": "any",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "string",
    "ints": "int list",
    "floats": "float list",
    "strings": "string list",
    "texts": "string list",
    "biases": "object",
    "object": "object",
}
TENSOR_TYPES = {
    "bool": {("BOOL", "1")},
    "int": {("INT32", "1"), ("UINT64", "1")},
    "float": {("FP32", "1")},
    "str": {("STRING", "1")},
    "ints": {("INT32", "-1")},
    "floats": {("FP32", "-1")},
    "strings": {("STRING", "-1")},
    "texts": {("STRING", "-1")},
}


def rows(title: str) -> list[list[str]]:
    """The cells of the table with these titles."""
    (table,) = re.findall(rf"^{re.escape(title)}\n\|[-|]+\|\n((?:\|.*\|\n)+)", PAGE, re.MULTILINE)
    return [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()
    ]


def names(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`(\w+)`", cell))


def of(fate: Fate) -> Iterator[Option]:
    return (option for option in OPTIONS.values() if option.fate is fate)


def test_what_is_honoured() -> None:
    tensors = {name for name, _, _ in TENSORS}
    documented = {
        names(row[0]): row[1:3] + row[4:5]
        for row in rows("| input | | type | default | from | |")
        if not set(names(row[0])) & NO_OPTIONS
    }
    assert documented == {
        option.names: [
            "T" if tensors & set(option.names) else "",
            TYPES[option.kind],
            option.whose,
        ]
        for option in of(Fate.HONOURED)
    }


def test_what_asks_for_nothing() -> None:
    documented = {
        names(row[0]): (row[1], row[2].split(", ")[0].strip("`"))
        for row in rows("| option | from | asks for nothing |")
    }
    assert documented == {
        option.names: (
            option.whose,
            json.dumps(option.nothing[0]).strip("`") if option.nothing else "",
        )
        for option in of(Fate.NOTHING)
    }


def test_what_is_ignored() -> None:
    documented = {name: row[1] for row in rows("| options | from |") for name in names(row[0])}
    assert documented == {option.name: option.whose for option in of(Fate.IGNORED)}


def test_every_tensor_is_an_option_of_its_type() -> None:
    for name, kind, dims in TENSORS:
        if name in NO_OPTIONS:
            continue
        option = OPTIONS[ALIASES[name]]
        if option.fate is not Fate.IGNORED:
            assert (kind, dims) in TENSOR_TYPES[option.kind], name


def test_a_row_that_says_something_else_is_found() -> None:
    assert ["`suffix`", "O", '`""`'] in rows("| option | from | asks for nothing |")
    assert names("`stop`, `stop_words`") == ("stop", "stop_words")
