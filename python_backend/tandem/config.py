"""Configuration of the engine; every value is checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tandem.errors import ConfigError

NO_DRAFTER = "none"
DRAFTER_TYPES = ("causal_lm", "mtp", "ngram")
_MODEL_TYPES = ("causal_lm", "mtp")
LOOKAHEADS = ("adaptive", "fixed")
DTYPES = ("auto", "bfloat16", "float16", "float32")

T = TypeVar("T")


def _from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    allowed = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} is required")
    return cls(**values)


def _check_int(where: str, name: str, value: object, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{where}: {name} must be a whole number {limits}, got {value!r}")


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
        where = f"drafters.{self.name}"
        if self.name == NO_DRAFTER:
            raise ConfigError(f"{where}: the name {NO_DRAFTER!r} is taken by plain decoding")
        if self.type not in DRAFTER_TYPES:
            raise ConfigError(
                f"{where}: unknown type {self.type!r}; known: {', '.join(DRAFTER_TYPES)}"
            )
        if "+" in self.name:
            raise ConfigError(f"{where}: a name can't have a '+', which joins two of them")
        if self.type in _MODEL_TYPES and not (isinstance(self.model, str) and self.model):
            raise ConfigError(
                f"{where}: type {self.type!r} needs 'model', a directory or hub id, "
                f"got {self.model!r}"
            )
        _check_int(where, "num_speculative_tokens", self.num_speculative_tokens, 1, 64)
        _check_int(where, "min_ngram_size", self.min_ngram_size, 1)
        _check_int(where, "max_ngram_size", self.max_ngram_size, self.min_ngram_size)
        _check_int(where, "num_shared_tokens", self.num_shared_tokens, 0)


@dataclass(frozen=True)
class EngineConfig:
    """What an `Engine` loads and how much it may run at once.

    Attributes:
        verifier: directory or hub id of the model whose text the user wants.
        dtype: "bfloat16", "float16" or "float32"; "auto" takes bfloat16 where the hardware
            multiplies it, and float32 on CPUs that would emulate it.
        device: "auto" takes CUDA where there is one; otherwise a torch device such as "cuda:1".
        drafters: name -> settings (see `DrafterConfig`).
        default_drafter: the drafter of requests that name none; the first one when not given.
        drafter_weights: drafter -> share of the requests that name none, for a comparison in
            service; takes the place of `default_drafter`.
        max_num_seqs: sequences in one batch.
        max_model_len: prompt and output tokens of one sequence; the model's own limit, at most
            4096, when not given.
        max_num_batched_tokens: tokens of one verifier pass; longer prompts are prefilled in chunks.
        max_prefill_slowdown: how many times as long steps may take because a prompt is computed
            beside sequences that decode, by the costs that an adaptive lookahead measures; more, in
            proportion, where there are more prompts than sequences that decode.
        block_size: tokens in one block of the KV cache.
        enable_prefix_caching: whether requests that begin alike share the K/V of their beginning.
        kv_cache_tokens: size of the KV cache in tokens. When not given: on CUDA what
            `gpu_memory_utilization` leaves after the weights and a trial pass; on a CPU enough for
            `max_num_seqs` sequences of `max_model_len`, up to a quarter of the free memory.
        gpu_memory_utilization: share of the GPU's memory that this process may fill.
        lookahead: "adaptive" drafts as far as it pays by measured costs and acceptance, at most
            each drafter's `num_speculative_tokens`; "fixed" always as many.
        batch_invariant: a request's tokens are the same, to the last bit of their logits, whatever
            else is in the batch, however its prompt is cut, with drafts and without, in bfloat16
            too; costs some time. On CPUs with oneDNN and a C compiler.
        enforce_eager: never compile passes into graphs, which takes half a minute when a model is
            first loaded on a machine.
        synthetic_acceptance_rates: for benchmarks alone: drafts are accepted by coin, at these
            shares of rounds by position, whatever the verifier says.
    """

    verifier: str
    dtype: str = "auto"
    device: str = "auto"
    drafters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    default_drafter: str | None = None
    drafter_weights: Mapping[str, float] = field(default_factory=dict)
    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int = 512
    max_prefill_slowdown: float = 2.0
    block_size: int = 16
    enable_prefix_caching: bool = True
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    lookahead: str = "adaptive"
    batch_invariant: bool = False
    enforce_eager: bool = False
    synthetic_acceptance_rates: Sequence[float] = ()

    def __post_init__(self) -> None:
        where = "engine"
        if not isinstance(self.verifier, str) or not self.verifier:
            raise ConfigError(f"{where}: verifier must be a directory or hub id")
        if self.dtype not in DTYPES:
            raise ConfigError(f"{where}: unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.lookahead not in LOOKAHEADS:
            raise ConfigError(
                f"{where}: unknown lookahead {self.lookahead!r}; known: {', '.join(LOOKAHEADS)}"
            )
        self._check_rates(where)
        _check_int(where, "max_num_seqs", self.max_num_seqs, 1)
        _check_int(where, "block_size", self.block_size, 1)
        _check_int(where, "max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs)
        for name in ("max_model_len", "kv_cache_tokens"):
            if getattr(self, name) is not None:
                _check_int(where, name, getattr(self, name), 2)
        for name in ("enable_prefix_caching", "batch_invariant", "enforce_eager"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {name} must be true or false, got {value!r}")
        slowdown = self.max_prefill_slowdown
        if not isinstance(slowdown, (int, float)) or not 1 < slowdown < math.inf:
            raise ConfigError(
                f"{where}: max_prefill_slowdown must be a number above 1, got {slowdown!r}"
            )
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(
                f"{where}: gpu_memory_utilization must be above 0 and at most 1, got {share!r}"
            )
        known = ", ".join(self.max_lookaheads)
        if self.default_drafter is not None and self.default_drafter not in self.max_lookaheads:
            raise ConfigError(
                f"{where}: default_drafter {self.default_drafter!r} is not configured; "
                f"choose from {known}"
            )
        for name, weight in dict(self.drafter_weights).items():
            if name not in self.max_lookaheads:
                raise ConfigError(
                    f"{where}: drafter_weights: {name!r} is not configured; choose from {known}"
                )
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not 0 <= weight < math.inf:
                raise ConfigError(
                    f"{where}: drafter_weights.{name} must be a number from 0, got {weight!r}"
                )
        if self.drafter_weights and not any(self.drafter_weights.values()):
            raise ConfigError(f"{where}: drafter_weights must not all be 0")

    def _check_rates(self, where: str) -> None:
        rates = self.synthetic_acceptance_rates
        shares = isinstance(rates, (list, tuple)) and all(
            isinstance(rate, (int, float)) and 0 <= rate <= 1 for rate in rates
        )
        if not shares or list(rates) != sorted(rates, reverse=True):
            raise ConfigError(
                f"{where}: synthetic_acceptance_rates must be shares from 0 to 1, none above the "
                f"one before, got {rates!r}"
            )

    @cached_property
    def max_lookaheads(self) -> dict[str, int]:
        """Every drafter that a request may name, with the most tokens that it guesses in a round.

        `A+B` looks up with the n-gram drafter A and guesses with the model B elsewhere.
        """
        limits = {NO_DRAFTER: 0}
        limits |= {name: d.num_speculative_tokens for name, d in self.drafter_configs.items()}
        for ngram, model in self.drafter_pairs:
            limits[f"{ngram}+{model}"] = max(limits[ngram], limits[model])
        return limits

    @property
    def drafter_pairs(self) -> list[tuple[str, str]]:
        """The n-gram and model drafters that can be joined."""
        by_type = {name: drafter.type for name, drafter in self.drafter_configs.items()}
        return [
            (ngram, model)
            for ngram in by_type
            for model in by_type
            if by_type[ngram] == "ngram" and by_type[model] in _MODEL_TYPES
        ]

    @cached_property
    def drafter_configs(self) -> dict[str, DrafterConfig]:
        """The drafters by name, parsed."""
        if not isinstance(self.drafters, Mapping):
            raise ConfigError(f"engine: drafters must map names to settings, got {self.drafters!r}")
        parsed = {}
        for name, settings in self.drafters.items():
            if not isinstance(settings, Mapping):
                raise ConfigError(f"drafters.{name}: settings must be an object, got {settings!r}")
            if "name" in settings:
                raise ConfigError(f"drafters.{name}: the key is the name; leave 'name' out")
            values = {"type": name, **settings, "name": name}
            parsed[name] = _from_mapping(DrafterConfig, values, f"drafters.{name}")
        return parsed

    def draft_model(self, drafter: str) -> str | None:
        """The `causal_lm` drafter in a drafter's name, by itself or joined, if there is one."""
        for name in drafter.split("+"):
            if name in self.drafter_configs and self.drafter_configs[name].type == "causal_lm":
                return name
        return None

    @property
    def drafter_name(self) -> str:
        """The drafter of requests that name none."""
        return self.default_drafter or next(iter(self.drafter_configs), NO_DRAFTER)

    @classmethod
    def from_json(cls, path: str | Path) -> EngineConfig:
        """Reads a `model.json`. Relative paths of models are relative to the file.

        Raises:
            ConfigError: the file is missing, isn't JSON, or holds an unknown key or bad value.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must hold a JSON object")

        def resolve(model: Any) -> Any:
            local = path.parent / model if isinstance(model, str) else None
            return str(local.resolve()) if local is not None and local.exists() else model

        if "verifier" in values:
            values["verifier"] = resolve(values["verifier"])
        if isinstance(values.get("drafters"), dict):
            values["drafters"] = {
                name: {**drafter, "model": resolve(drafter["model"])}
                if isinstance(drafter, dict) and "model" in drafter
                else drafter
                for name, drafter in values["drafters"].items()
            }
        return _from_mapping(cls, values, str(path))
