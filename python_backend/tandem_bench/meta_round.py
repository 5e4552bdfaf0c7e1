"""A round's programs on tensors that have shapes and no contents, for models without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from tandem import EngineConfig
from tandem.cache.kv_cache import KVCache, LayerShape
from tandem.cache.layer_groups import plan_groups, windows_of
from tandem.cuda.attention import PagedAttention
from tandem.cuda.round_tools import RoundTools
from tandem.cuda.sampling import choose
from tandem.cuda.wing import CUDAWing
from tandem.drafters.mtp import Gemma4Drafter
from tandem.models.attention import ATTENTION
from tandem.models.head import OutputHead
from tandem.models.probing import probe
from tandem.models.verifier import Verifier
from tandem.rounds.programs import Programs
from tandem.rounds.state import DeviceState

_META = torch.device("meta")
_MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Load:
    """What takes part: so many sequences, each with so many drafts; none is plain decoding."""

    num_sequences: int
    num_drafts: int

    @property
    def num_rows(self) -> int:
        """Of a pass."""
        return self.num_sequences * (1 + self.num_drafts)


class MetaRound:
    """A verifier, its assistant, and the programs that a GPU would run for them.

    Attributes:
        shapes: what the verifier's layers store.
    """

    def __init__(self, verifier: PreTrainedModel, assistant: PreTrainedModel, depth: int) -> None:
        """Takes models on `meta`.

        Args:
            depth: drafts of a round at most.
        """
        verifier.set_attn_implementation(ATTENTION)
        head = OutputHead(verifier)
        head.is_deferred = True
        settings = EngineConfig(
            verifier="none",
            drafters={"mtp": {"model": "none", "num_speculative_tokens": depth}},
            max_num_seqs=64,
            max_num_batched_tokens=2048,
        )
        self.shapes = _shapes(verifier)
        cache = _cache(self.shapes, verifier.dtype, settings)
        state = DeviceState(Verifier(verifier, head, cache), settings, _MAX_MODEL_LEN)
        self.verifier = verifier
        self.assistant = assistant
        self._programs = Programs(
            Verifier(verifier, head, cache),
            [Gemma4Drafter(assistant, verifier, cache)],
            state,
            RoundTools(PagedAttention(), choose, _META),
            settings.max_num_batched_tokens,
        )

    def programs(self, load: Load) -> dict[str, Callable[[], Any]]:
        """What a step launches, by name, in its order."""
        size = self._programs.pass_size(load.num_rows, load.num_rows)
        verified: list[Any] = []
        found: dict[str, Callable[[], Any]] = {}
        if load.num_drafts:
            found["draft"] = partial(self._programs.draft, 0, load.num_sequences, load.num_drafts)
        found["verify"] = lambda: verified.append(self._programs.verify(size))
        found["accept"] = lambda: self._programs.accept(size, verified.pop(), adjusts=False)
        return found


def of_shape(
    config: Gemma4TextConfig, assistant: Gemma4AssistantConfig, dtype: torch.dtype, depth: int
) -> MetaRound:
    """Models as transformers makes them, of any size: none of their weights is anywhere."""
    with _META:
        models = _models(config, assistant, dtype)
    return MetaRound(*models, depth)


def fused(
    config: Gemma4TextConfig, assistant: Gemma4AssistantConfig, dtype: torch.dtype, depth: int
) -> MetaRound:
    """Models of small sizes as the CUDA wing lays them out, which tries what it puts in."""
    torch.manual_seed(0)
    verifier, drafter = _models(config, assistant, dtype)
    wing = CUDAWing(torch.device("cpu"))
    with wing.joinable(verifier) as groups:
        probe(verifier)
    wing.prepare(verifier, groups)
    wing.prepare_drafter(drafter)
    return MetaRound(to_meta(verifier), to_meta(drafter), depth)


def _models(
    config: Gemma4TextConfig, assistant: Gemma4AssistantConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    models = Gemma4ForCausalLM(config), Gemma4AssistantForCausalLM(assistant)
    for model in models:
        nn.Module.to(model.requires_grad_(False).train(False), dtype)
    return models


def to_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Drops all contents, those of tensors too that modules keep beside their parameters."""
    nn.Module.to(model, _META)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                setattr(module, name, value.to(_META))
    return model


def _shapes(verifier: PreTrainedModel) -> list[LayerShape]:
    """What each layer of a Gemma 4 stores, if it does."""
    config: Any = verifier.config.get_text_config()
    shapes = []
    for index, kind in enumerate(config.layer_types):
        if config.kv_sharing_modes[index] == "reuse":
            continue
        layer = config.per_layer_config[index]
        window = config.sliding_window if kind == "sliding_attention" else None
        shapes.append(LayerShape(index, layer.num_key_value_heads, layer.head_dim, window))
    return shapes


def _cache(shapes: list[LayerShape], dtype: torch.dtype, settings: EngineConfig) -> KVCache:
    groups = plan_groups(
        windows_of((shape.window for shape in shapes), _MAX_MODEL_LEN),
        settings.max_num_seqs * _MAX_MODEL_LEN,
        settings.block_size,
        _MAX_MODEL_LEN,
        settings.max_num_seqs,
        settings.max_num_batched_tokens,
    )
    write = CUDAWing(torch.device("cpu")).write_kv()
    return KVCache(shapes, groups, settings.block_size, dtype, _META, has_scratch=True, write=write)
