"""Models from disk or hub, and the room that they get in the cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tandem.cache.kv_cache import KVCache
from tandem.cache.room import CacheRoom
from tandem.config import EngineConfig
from tandem.errors import ConfigError, DrafterMismatchError
from tandem.models.attention import ATTENTION
from tandem.models.checkpoint import load_model, load_tokenizer
from tandem.models.compiled_pass import CompiledPass, compile_pass
from tandem.models.head import OutputHead
from tandem.models.invariance import make_invariant
from tandem.models.probing import check_paged, probe
from tandem.wing import Wing, device_of, wing_of

logger = logging.getLogger("tandem")

_DEFAULT_MODEL_LEN = 4096
_NUM_VOCABULARY_PROBES = 2000
# RoPE that turns all sequences of a pass otherwise as soon as one of them is longer than this.
_CHANGING_ROPE = ("longrope", "dynamic")


@dataclass(frozen=True)
class CachedModel:
    """A model that is known to run on the paged cache."""

    model: PreTrainedModel
    cache: KVCache


@dataclass(frozen=True)
class LoadedVerifier:
    """A verifier that is known to run on the paged cache.

    `draft_models` are the causal LMs that draft for it, by drafter; their caches have the
    verifier's geometry. `room` says how large that of all of them is for so many tokens. With
    `batch_invariant`, a token's logits depend to the last bit on nothing
    but the tokens before it.
    """

    model: PreTrainedModel
    head: OutputHead
    tokenizer: PreTrainedTokenizerBase | None
    cache: KVCache
    room: CacheRoom
    compiled: CompiledPass | None
    max_model_len: int
    eos_token_ids: frozenset[int]
    batch_invariant: bool
    draft_models: dict[str, CachedModel]


def load_verifier(config: EngineConfig) -> LoadedVerifier:
    """Loads the verifier and its tokenizer, sizes the cache, and compares a paged pass with HF's.

    Raises:
        ConfigError: the model can't be found, or the cache is too small for one sequence.
        UnsupportedModelError: the architecture doesn't fit the paged cache.
    """
    dtype, device = resolve(config.dtype, config.device)
    wing = wing_of(device)
    wing.set_up()
    model = load_model(config.verifier, dtype, device, key="verifier")
    text_config = model.config.get_text_config()
    limit = _longest(text_config)
    max_model_len = config.max_model_len or min(limit, _DEFAULT_MODEL_LEN)
    if max_model_len > limit:
        raise ConfigError(
            f"max_model_len {max_model_len} is beyond the verifier's limit of {limit} tokens"
        )
    tokenizer = load_tokenizer(config.verifier)
    models = {None: model} | _load_draft_models(config, model, tokenizer)
    # What each model stores in the cache, and its own logits for a few tokens.
    head = OutputHead(model)
    probes, joined = {}, {}
    for name, each in models.items():
        with wing.joinable(each) as joined[name]:
            probes[name] = probe(each)
    head.examine(probes[None][1])
    for name, each in models.items():
        wing.prepare(each, joined[name])
    head.index()
    # They hold what has been replaced.
    del joined
    batch_invariant = make_invariant(model, config.batch_invariant)
    all_shapes = [shape for shapes, _ in probes.values() for shape in shapes]
    room = CacheRoom(all_shapes, max_model_len, dtype, config)
    num_tokens = _cache_tokens(config, wing, room)
    room.check(num_tokens)
    groups = room.groups(num_tokens)
    cached = {}
    for name, each in models.items():
        shapes, expected = probes[name]
        cache = KVCache(
            shapes,
            groups,
            config.block_size,
            dtype,
            device,
            has_scratch=wing.round_tools(dtype) is not None,
            write=wing.write_kv(),
        )
        each.set_attn_implementation(ATTENTION)
        check_paged(each, cache, expected)
        cached[name] = CachedModel(each, cache)
    head.defer()
    verifier = cached.pop(None)
    compiles = head.is_deferred and not config.enforce_eager
    if not (compiles or config.enforce_eager):
        logger.info("%s runs uncompiled: it changes its logits", type(model).__name__)
    if not cache_grows(config, wing):
        logger.info("KV cache: %s", room.describe(num_tokens))
    draft_models = {name: each for name, each in cached.items() if name is not None}
    return LoadedVerifier(
        model,
        head,
        tokenizer,
        verifier.cache,
        room,
        compile_pass(model, verifier.cache) if compiles else None,
        max_model_len,
        _eos_token_ids(model),
        batch_invariant,
        draft_models,
    )


def _longest(config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence that the model is for."""
    longest: int = getattr(config, "max_position_embeddings", None) or _DEFAULT_MODEL_LEN
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if settings.get("rope_type") in _CHANGING_ROPE:
            longest = min(longest, settings.get("original_max_position_embeddings") or longest)
    return longest


def _load_draft_models(
    config: EngineConfig, verifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str | None, PreTrainedModel]:
    """The models of `causal_lm` drafters, which must have the verifier's vocabulary."""
    models: dict[str | None, PreTrainedModel] = {}
    for name, settings in config.drafter_configs.items():
        if settings.type == "causal_lm":
            assert settings.model is not None, "DrafterConfig lets none without a model through"
            model = load_model(
                settings.model, verifier.dtype, verifier.device, key=f"drafters.{name}.model"
            )
            _check_vocabulary(name, settings.model, model, verifier, tokenizer)
            models[name] = model
    return models


def _check_vocabulary(
    name: str,
    path: str,
    model: PreTrainedModel,
    verifier: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    sizes = [each.config.get_text_config().vocab_size for each in (model, verifier)]
    if sizes[0] != sizes[1]:
        raise DrafterMismatchError(
            f"drafters.{name}: {path} has a vocabulary of {sizes[0]} tokens, and the verifier of "
            f"{sizes[1]}; they must be the same"
        )
    other = load_tokenizer(path)
    if tokenizer is None or other is None:
        return
    ids = list(range(0, sizes[1], max(1, sizes[1] // _NUM_VOCABULARY_PROBES)))
    for token_id, token, mine in zip(
        ids, tokenizer.convert_ids_to_tokens(ids), other.convert_ids_to_tokens(ids), strict=True
    ):
        if token != mine:
            raise DrafterMismatchError(
                f"drafters.{name}: token {token_id} is {mine!r} in {path} and {token!r} in the "
                "verifier; they must have the same tokenizer"
            )


def resolve(dtype: str, device: str) -> tuple[torch.dtype, torch.device]:
    """What `EngineConfig.dtype` and `EngineConfig.device` stand for on this machine.

    Raises:
        ConfigError: there is no such device.
    """
    found = device_of(device)
    if dtype != "auto":
        return getattr(torch, dtype), found
    return wing_of(found).default_dtype(), found


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    generation: GenerationConfig | None = model.generation_config
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def cache_grows(config: EngineConfig, wing: Wing) -> bool:
    """Whether the cache has its size only once it is known what everything else takes."""
    return wing.fills_memory and config.kv_cache_tokens is None


def _cache_tokens(config: EngineConfig, wing: Wing, room: CacheRoom) -> int:
    if config.kv_cache_tokens is not None:
        num_tokens = config.kv_cache_tokens // config.block_size * config.block_size
        needed, free = room.num_bytes(num_tokens), wing.free_bytes()
        if needed > free:
            raise ConfigError(
                f"kv_cache_tokens {config.kv_cache_tokens} need {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free"
            )
        return num_tokens
    if cache_grows(config, wing):
        return room.least
    wanted = config.max_num_seqs * room.least
    num_bytes = room.num_bytes(wanted)
    found = wing.cache_bytes(num_bytes, config.gpu_memory_utilization, 0)
    return wanted if found == num_bytes else room.num_tokens(found)
