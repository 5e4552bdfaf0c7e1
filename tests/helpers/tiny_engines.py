"""Tiny checkpoints and engines, each made when a test first asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tandem import Engine, EngineConfig
from tiny_models import load_reference, save_assistant, save_verifier

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_LOOKAHEAD = 8


def config_of(path: Path, **changes: Any) -> EngineConfig:
    """A configuration with a small cache for the model in `path`."""
    values = {
        "dtype": "float32",
        "max_model_len": 64,
        "kv_cache_tokens": 512,
        "block_size": 4,
        "enforce_eager": True,
    }
    return EngineConfig(**{"verifier": str(path), **values, **changes})


class TinyModels:
    """Checkpoints by name; each is made when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self.verifier: Callable[[str], Path] = cache(lambda name: save_verifier(name, directory))
        self.assistant: Callable[[str], Path] = cache(lambda name: save_assistant(name, directory))
        self.reference: Callable[[str], PreTrainedModel] = cache(
            lambda name: load_reference(self.verifier(name)).to(DEVICE)
        )


class Engines:
    """Engines that tests share: one for each verifier and set of settings."""

    def __init__(self, tiny: TinyModels) -> None:
        self._tiny = tiny
        self._loaded: dict[str, Engine] = {}

    def __call__(self, name: str, **settings: Any) -> Engine:
        """The engine that all tests with these settings share; see `make`."""
        key = json.dumps([name, settings])
        if key not in self._loaded:
            self._loaded[key] = self.make(name, **settings)
        return self._loaded[key]

    def make(
        self, name: str, *, mtp: bool = False, causal_lm: str | None = None, **settings: Any
    ) -> Engine:
        """An engine with an n-gram drafter and, if asked for, other tiny ones.

        Args:
            mtp: whether to load the verifier's assistant.
            causal_lm: the tiny verifier that drafts.
        """
        drafters: dict[str, Any] = {
            "ngram": {"num_speculative_tokens": MAX_LOOKAHEAD, "min_ngram_size": 1}
        }
        if mtp:
            assistant = str(self._tiny.assistant(name))
            drafters["mtp"] = {"model": assistant, "num_speculative_tokens": MAX_LOOKAHEAD}
        if causal_lm is not None:
            model = str(self._tiny.verifier(causal_lm))
            drafters["causal_lm"] = {"model": model, "num_speculative_tokens": MAX_LOOKAHEAD}
        values = {
            "verifier": str(self._tiny.verifier(name)),
            "dtype": "float32",
            "drafters": drafters,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "max_model_len": 256,
            "block_size": 4,
            "kv_cache_tokens": 8192,
            # Rounds of known length; adaptive ones are tests of their own.
            "lookahead": "fixed",
            # Compiling takes longer than a test; it has tests of its own.
            "enforce_eager": True,
            # What one test has run would be in the cache for all others.
            "enable_prefix_caching": False,
            **settings,
        }
        return Engine(EngineConfig(**values))

    def check_idle(self) -> None:
        """No engine has work or blocks in use; one that has is not used again."""
        for key, engine in list(self._loaded.items()):
            try:
                engine.check_integrity()
                assert not engine.has_work
                assert engine.load.num_blocks_used == 0
            except AssertionError:
                del self._loaded[key]
                raise
