"""Configuration of the engine; every value is checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tandem.checks import (
    check_bool,
    check_int,
    check_known,
    check_model,
    from_mapping,
    is_number,
    read_object,
    show,
)
from tandem.drafter_config import MODEL_TYPES, NO_DRAFTER, DrafterConfig, parse_drafters
from tandem.errors import ConfigError

LOOKAHEADS = ("adaptive", "fixed")
AUTO = "auto"  # is decided when the engine loads
DTYPES = (AUTO, "bfloat16", "float16", "float32")
# What is above these is a slip of the pen: it would take memory or minutes and gain nothing.
_MAX_NUM_SEQS = 2**16
_MAX_TOKENS = 2**24  # of a sequence or a pass
_MAX_BLOCK_SIZE = 2**16
_MAX_CACHE_TOKENS = 2**40
_MAX_SLOWDOWN = 1e6
_MAX_WEIGHT = 1e9


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
        kv_cache_tokens: tokens of context that the KV cache holds. When not given: on CUDA what
            `gpu_memory_utilization` leaves beside weights, graphs and the largest pass; on a CPU
            `max_num_seqs` sequences of `max_model_len`, up to a quarter of the free memory.
        gpu_memory_utilization: share of the GPU's memory that this process may fill.
        lookahead: "adaptive" drafts as far as it pays by measured costs and acceptance, at most
            each drafter's `num_speculative_tokens`; "fixed" always as many.
        batch_invariant: a request's tokens are the same, to the last bit of their logits, whatever
            else is in the batch, however its prompt is cut, with drafts and without, in bfloat16
            too. "auto" has it so where that costs next to nothing, and the log says so; true
            insists on it.
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
    batch_invariant: bool | str = AUTO
    enforce_eager: bool = False
    synthetic_acceptance_rates: Sequence[float] = ()

    def __post_init__(self) -> None:
        where = "engine"
        check_model(where, "verifier", self.verifier)
        check_known(where, "dtype", self.dtype, DTYPES)
        check_known(where, "lookahead", self.lookahead, LOOKAHEADS)
        if not isinstance(self.device, str):
            raise ConfigError(f"{where}: device must be a string, got {show(self.device)}")
        for name in ("enable_prefix_caching", "enforce_eager"):
            check_bool(where, name, getattr(self, name))
        if not isinstance(self.batch_invariant, bool) and self.batch_invariant != AUTO:
            raise ConfigError(
                f'{where}: batch_invariant must be true, false or "{AUTO}", '
                f"got {show(self.batch_invariant)}"
            )
        self._check_numbers(where)
        self._check_drafters(where)

    def _check_numbers(self, where: str) -> None:
        check_int(where, "max_num_seqs", self.max_num_seqs, 1, _MAX_NUM_SEQS)
        check_int(where, "block_size", self.block_size, 1, _MAX_BLOCK_SIZE)
        for name, low, high in (
            ("max_num_batched_tokens", self.max_num_seqs, _MAX_TOKENS),
            ("max_model_len", 2, _MAX_TOKENS),
            ("kv_cache_tokens", 2, _MAX_CACHE_TOKENS),
        ):
            if getattr(self, name) is not None or name == "max_num_batched_tokens":
                check_int(where, name, getattr(self, name), low, high)
        slowdown = self.max_prefill_slowdown
        if not is_number(slowdown, 1, _MAX_SLOWDOWN) or slowdown == 1:
            raise ConfigError(
                f"{where}: max_prefill_slowdown must be a number above 1 and at most "
                f"{_MAX_SLOWDOWN:.0f}, got {show(slowdown)}"
            )
        share = self.gpu_memory_utilization
        if not is_number(share, 0, 1) or share == 0:
            raise ConfigError(
                f"{where}: gpu_memory_utilization must be above 0 and at most 1, got {show(share)}"
            )
        rates = self.synthetic_acceptance_rates
        shares = isinstance(rates, (list, tuple)) and all(is_number(rate, 0, 1) for rate in rates)
        if not shares or list(rates) != sorted(rates, reverse=True):
            raise ConfigError(
                f"{where}: synthetic_acceptance_rates must be shares from 0 to 1, none above the "
                f"one before, got {show(rates)}"
            )

    def _check_drafters(self, where: str) -> None:
        known = list(self.max_lookaheads)
        default = self.default_drafter
        if default is not None and default not in known:
            raise ConfigError(
                f"{where}: default_drafter {show(default)} is not configured; "
                f"choose from {', '.join(known)}"
            )
        weights = self.drafter_weights
        if not isinstance(weights, Mapping):
            raise ConfigError(
                f"{where}: drafter_weights must map drafters to numbers, got {show(weights)}"
            )
        for name, weight in weights.items():
            if name not in known:
                raise ConfigError(
                    f"{where}: drafter_weights: {show(name)} is not configured; "
                    f"choose from {', '.join(known)}"
                )
            if not is_number(weight, 0, _MAX_WEIGHT):
                raise ConfigError(
                    f"{where}: drafter_weights.{name} must be a number from 0 to "
                    f"{_MAX_WEIGHT:.0f}, got {show(weight)}"
                )
        if weights and not any(weights.values()):
            raise ConfigError(f"{where}: drafter_weights must not all be 0")

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
            if by_type[ngram] == "ngram" and by_type[model] in MODEL_TYPES
        ]

    @cached_property
    def drafter_configs(self) -> dict[str, DrafterConfig]:
        """The drafters by name, parsed."""
        return parse_drafters(self.drafters)

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
        values = read_object(path)
        if "verifier" in values:
            values["verifier"] = _resolve(path.parent, values["verifier"])
        if isinstance(values.get("drafters"), dict):
            values["drafters"] = {
                name: {**drafter, "model": _resolve(path.parent, drafter["model"])}
                if isinstance(drafter, dict) and "model" in drafter
                else drafter
                for name, drafter in values["drafters"].items()
            }
        return from_mapping(cls, values, str(path))


def _resolve(directory: Path, model: Any) -> Any:
    """The path of a model that lies beside a configuration; anything else as it is."""
    if not isinstance(model, str) or not model:
        return model
    local = directory / model
    try:
        return str(local.resolve()) if local.exists() else model
    except OSError:  # too long for a path
        return model
