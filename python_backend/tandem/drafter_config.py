"""Configuration of the drafters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.checks import check_int, check_known, check_model, from_mapping, show
from tandem.errors import ConfigError

NO_DRAFTER = "none"
DRAFTER_TYPES = ("causal_lm", "mtp", "ngram")
MODEL_TYPES = ("causal_lm", "mtp")
_MAX_DRAFTERS = 32
_MAX_NAME = 64
_MAX_NGRAM_SIZE = 1024
_MAX_SHARED_TOKENS = 2**30


@dataclass(frozen=True)
class DrafterConfig:
    """One entry of `EngineConfig.drafters`.

    `type` defaults to the entry's name. `model` is a directory or hub id (types `causal_lm` and
    `mtp`). The n-gram sizes bound the suffix that type `ngram` looks up; with `num_shared_tokens`
    it also looks in that many tokens of requests that have ended, whoever sent them.
    """

    name: str
    type: str
    num_speculative_tokens: int = 4
    model: str | None = None
    max_ngram_size: int = 32
    min_ngram_size: int = 2
    num_shared_tokens: int = 0

    def __post_init__(self) -> None:
        where = _where(self.name)
        if self.name == NO_DRAFTER:
            raise ConfigError(f"{where}: the name {NO_DRAFTER!r} is taken by plain decoding")
        check_known(where, "type", self.type, DRAFTER_TYPES)
        if "+" in self.name:
            raise ConfigError(f"{where}: a name can't have a '+', which joins two of them")
        if self.type in MODEL_TYPES:
            check_model(where, "model", self.model)
        elif self.model is not None:
            raise ConfigError(f"{where}: type {self.type!r} has no 'model', got {show(self.model)}")
        check_int(where, "num_speculative_tokens", self.num_speculative_tokens, 1, 64)
        check_int(where, "min_ngram_size", self.min_ngram_size, 1, _MAX_NGRAM_SIZE)
        check_int(
            where, "max_ngram_size", self.max_ngram_size, self.min_ngram_size, _MAX_NGRAM_SIZE
        )
        check_int(where, "num_shared_tokens", self.num_shared_tokens, 0, _MAX_SHARED_TOKENS)


def parse_drafters(drafters: Mapping[str, Mapping[str, Any]]) -> dict[str, DrafterConfig]:
    """The drafters by name, from settings by name.

    Raises:
        ConfigError: a name or a setting is none.
    """
    if not isinstance(drafters, Mapping):
        raise ConfigError(f"drafters must map names to settings, got {show(drafters)}")
    if len(drafters) > _MAX_DRAFTERS:
        raise ConfigError(f"drafters may be {_MAX_DRAFTERS} at most, got {len(drafters)}")
    parsed = {}
    for name, settings in drafters.items():
        where = _where(name)
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{where}: settings must be an object, got {show(settings)}")
        if "name" in settings:
            raise ConfigError(f"{where}: the key is the name; leave 'name' out")
        values = {"type": name, **settings, "name": name}
        parsed[name] = from_mapping(DrafterConfig, values, where)
    return parsed


def _where(name: object) -> str:
    if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= _MAX_NAME):
        raise ConfigError(
            f"drafters: a name must have 1 to {_MAX_NAME} printable characters, got {show(name)}"
        )
    return f"drafters.{name}"
