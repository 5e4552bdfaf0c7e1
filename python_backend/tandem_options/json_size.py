"""How many values JSON holds, told before they are made."""

from __future__ import annotations

from tandem_options.errors import OptionError

# To make so many takes Python 10 ms, during which no other thread of the process goes on.
_MAX_JSON_VALUES = 2**16


def check_json(name: str, text: str) -> None:
    """Refuses JSON that holds so many values that to make them would hold others up.

    Raises:
        OptionError: naming the input.
    """
    if _count_values(text) > _MAX_JSON_VALUES:
        raise OptionError(name, f"holds more than {_MAX_JSON_VALUES} values: send less")


def _count_values(text: str) -> int:
    """Of JSON, without making them."""
    count = _count_marks(text)
    if count <= _MAX_JSON_VALUES:
        return count
    # Perhaps it is text that holds the marks: look at what is between the texts.
    bare = text.replace("\\\\", "").replace('\\"', "")
    num_texts = bare.count('"') // 2
    if num_texts > 2 * _MAX_JSON_VALUES:
        return num_texts
    return _count_marks("".join(bare.split('"')[::2]))


def _count_marks(text: str) -> int:
    return 1 + sum(map(text.count, ",[{"))
