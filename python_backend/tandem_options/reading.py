"""What a request asks for, by canonical names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tandem_options.errors import OptionError, shorten
from tandem_options.table import ALIASES, OPTIONS, Fate, Option
from tandem_options.values import convert

# NVIDIA's object of more options.
_NESTED = "nvext"
_SEEDS = 2**64
_EMPTY: tuple[Any, ...] = ("", (), {})


@dataclass(frozen=True)
class Reading:
    """What was found in a request.

    Attributes:
        values: those to be honoured, by canonical name.
        unknown: names that are in no table, as they were sent.
    """

    values: dict[str, Any]
    unknown: tuple[str, ...]


def read(*sources: Mapping[str, Any]) -> Reading:
    """Reads options from mappings, of which earlier ones win; in one, canonical names win.

    Null means that an option is not given.

    Raises:
        OptionError: a value can't be read, or asks for what can't be done.
    """
    values: dict[str, Any] = {}
    unknown: dict[str, None] = {}
    for prefix, source in _flat(sources):
        found = _known(source)
        for name, (sent, value) in found.items():
            option = OPTIONS[name]
            if name in values or option.fate is Fate.IGNORED:
                continue
            value = convert(sent, value, option.kind)
            if sent not in option.unset or value != option.unset[sent]:
                values[name] = value
                _check(option, sent, value)
        unknown |= {f"{prefix}{name}": None for name in source if name not in ALIASES}
    if "best_of" in values:
        _check_best_of(values["best_of"], values.get("n", 1))
    honoured = {
        name: value for name, value in values.items() if OPTIONS[name].fate is Fate.HONOURED
    }
    _settle(honoured)
    return Reading(honoured, tuple(unknown))


def _flat(sources: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each source without what isn't given, and behind it the one in it."""
    for source in sources:
        given = {name: value for name, value in source.items() if value is not None}
        nested = given.pop(_NESTED, None)
        yield "", given
        if nested is not None:
            inner = convert(_NESTED, nested, "object")
            for name in inner:
                convert(_NESTED, name, "str")  # half of a surrogate pair is no name
            yield f"{_NESTED}.", {name: v for name, v in inner.items() if v is not None}


def _known(source: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Canonical name -> the name that was sent, and its value."""
    names = {ALIASES[name] for name in source if name in ALIASES}
    return {
        name: next((sent, source[sent]) for sent in OPTIONS[name].names if sent in source)
        for name in names
    }


def _check(option: Option, sent: str, value: Any) -> None:
    """Refuses what would change the answer and can't be done."""
    if option.fate is not Fate.NOTHING or option.name == "best_of" or value in option.nothing:
        return
    allowed = next((str(each) for each in option.nothing if each not in _EMPTY), "left out")
    raise OptionError(sent, f"must be {allowed}, got {shorten(value)}: {option.cure}")


def _check_best_of(best_of: int, n: int) -> None:
    if best_of not in (1, n):
        cure = OPTIONS["best_of"].cure
        raise OptionError("best_of", f"must be n, which is {n}, got {shorten(best_of)}: {cure}")


def _settle(values: dict[str, Any]) -> None:
    """Options that say the same as others, in other words."""
    if values.pop("greed_sampling", False):
        values["temperature"] = 0.0
    if values.pop("echo", False):
        values.setdefault("exclude_input_in_output", False)
    if -(_SEEDS // 2) <= values.get("seed", 0) < 0:
        values["seed"] += _SEEDS
