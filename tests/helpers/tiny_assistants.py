"""Assistants for tiny verifiers as training starts them, and engines that draft with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tandem import Engine, EngineConfig
from tandem.drafters.assistant import Assistant
from tandem.models.checkpoint import load_model
from tandem_train.corpus import TrainingText
from tandem_train.features import DENSE_ATTENTION, FeatureStore
from tandem_train.start import default_source_layers, fit_pre_projection, new_assistant
from tiny_engines import DEVICE
from tiny_models import VOCAB_SIZE

LOOKAHEAD = 4
DRAFT_TOKENS = list(range(3, VOCAB_SIZE, 2))


def texts(count: int, length: int = 48) -> list[TrainingText]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCAB_SIZE, (count, length), generator=generator).tolist()
    return [TrainingText(index, row, 4, 1.0) for index, row in enumerate(rows)]


def make_assistant(path: Path) -> tuple[Assistant, FeatureStore]:
    """An assistant of the verifier in `path` as training starts it, and what it reads."""
    verifier = load_model(str(path), torch.float32, torch.device(DEVICE))
    verifier.set_attn_implementation(DENSE_ATTENTION)
    source_layers = default_source_layers(verifier)
    assistant = new_assistant(verifier, source_layers, DRAFT_TOKENS)
    store = FeatureStore(verifier, source_layers, 128, torch.float32)
    fit_pre_projection(assistant, verifier, store.token_batches(texts(40)))
    return assistant, store


def engine_with(verifier: Path, drafter: Path, **settings: Any) -> Engine:
    return Engine(
        EngineConfig(
            verifier=str(verifier),
            dtype="float32",
            drafters={"mtp": {"model": str(drafter), "num_speculative_tokens": LOOKAHEAD}},
            max_model_len=256,
            lookahead="fixed",
            block_size=4,
            kv_cache_tokens=2048,
            **{"enforce_eager": True, **settings},
        )
    )
