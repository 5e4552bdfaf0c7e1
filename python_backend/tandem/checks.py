"""Checks of a configuration: what is wrong is named, in one line, with what is allowed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tandem.errors import ConfigError, shorten

# Longer ones are beyond every limit, and Python refuses to read the longest.
_MAX_DIGITS = 100
_MAX_PATH = 4096

T = TypeVar("T")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: the file is missing, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_int=_parse_int)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return values


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Makes a dataclass of values by the names of its fields.

    Raises:
        ConfigError: a key is unknown or missing.
    """
    fields = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    allowed = [f.name for f in fields]
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {shorten(unknown[0])}; allowed: {', '.join(allowed)}"
        )
    nothing = dataclasses.MISSING
    for each in fields:
        if each.default is each.default_factory is nothing and each.name not in values:
            raise ConfigError(f"{where}: {each.name!r} is required")
    return cls(**values)


def check_int(where: str, name: str, value: object, low: int, high: int) -> None:
    """Whether a value is a whole number within limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{where}: {name} must be a whole number from {low} to {high}, got {show(value)}"
        )


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value is a number within limits; a NaN is in none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def check_bool(where: str, name: str, value: object) -> None:
    """Whether a value is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {name} must be true or false, got {show(value)}")


def check_known(where: str, name: str, value: object, known: Sequence[str]) -> None:
    """Whether a value is one of a few words."""
    if value not in known:
        raise ConfigError(f"{where}: unknown {name} {show(value)}; known: {', '.join(known)}")


def check_model(where: str, name: str, value: object) -> None:
    """Whether a value can be the name of a model."""
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_PATH:
        raise ConfigError(f"{where}: {name} must be a directory or hub id, got {show(value)}")


def show(value: object) -> str:
    """A value for a message, in one line that isn't long."""
    try:
        return shorten(value)
    except (RecursionError, ValueError):
        return f"what is too large to show, of type {type(value).__name__}"
