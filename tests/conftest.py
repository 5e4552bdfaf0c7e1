"""Tiny models, saved once a session, and engines whose cache is recounted after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tandem import Engine, EngineConfig
from tiny_models import load_reference, save_assistant, save_verifier

# Tiny products gain nothing from a second thread.
torch.set_num_threads(1)


class TinyModels:
    """Checkpoints by name; each is made when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self.verifier: Callable[[str], Path] = cache(lambda name: save_verifier(name, directory))
        self.assistant: Callable[[str], Path] = cache(lambda name: save_assistant(name, directory))
        self.reference: Callable[[str], PreTrainedModel] = cache(
            lambda name: load_reference(self.verifier(name))
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make_engine(tiny: TinyModels) -> Iterator[Callable[..., Engine]]:
    """Makes engines on tiny verifiers; when the test is over, all their blocks must be free."""
    engines: list[Engine] = []

    def make(name: str, **settings: Any) -> Engine:
        settings = {
            "verifier": str(tiny.verifier(name)),
            "dtype": "float32",
            "max_model_len": 200,
            "kv_cache_tokens": 6400,
            "max_num_seqs": 32,
            **settings,
        }
        engines.append(Engine(EngineConfig(**settings)))
        return engines[-1]

    yield make
    for engine in engines:
        assert not engine.has_work
        engine.check_integrity()
        assert engine.load.num_blocks_used == 0
