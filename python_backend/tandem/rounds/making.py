"""Which round an engine has, and what it leaves for the KV cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch

from tandem.config import EngineConfig
from tandem.drafters.drafter import Drafter
from tandem.errors import ConfigError
from tandem.models.loading import LoadedVerifier, cache_grows
from tandem.models.verifier import Verifier
from tandem.rounds.device import DeviceRound
from tandem.rounds.host import HostRound
from tandem.rounds.rehearsal import rehearse
from tandem.rounds.round import Round
from tandem.wing import wing_of

logger = logging.getLogger("tandem")


def make_round(
    verifier: Verifier,
    drafters: Mapping[str, Drafter],
    loaded: LoadedVerifier,
    config: EngineConfig,
) -> Round:
    """One on the device, where the wing can run it.

    Where the KV cache is to fill the memory, it has its size afterwards: a first round and its
    graphs show, with the least of a cache, what everything else takes. Graphs know where K/V lie,
    so a second one takes its place.

    Args:
        drafters: by name.

    Raises:
        ConfigError: memory is not enough.
    """
    wing = wing_of(verifier.model.device)
    make = partial(_make, verifier, drafters, loaded, config)
    if not cache_grows(config, wing):
        return make()
    wing.release()
    caches = [loaded.cache, *(each.cache for each in loaded.draft_models.values())]
    first = make()
    try:
        rehearse(first, drafters, loaded, config)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a pass of max_num_batched_tokens, {config.max_num_batched_tokens}, takes more memory "
            "than is free: lower it"
        ) from error
    held = sum(cache.num_bytes for cache in caches)
    room = loaded.room
    num_tokens = room.num_tokens(wing.cache_bytes(0, config.gpu_memory_utilization, held))
    room.check(num_tokens)
    del first
    wing.release()
    try:
        for cache in caches:
            cache.allocate(room.groups(num_tokens))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the KV cache finds no memory, perhaps because another process has taken some: lower "
            "gpu_memory_utilization"
        ) from error
    logger.info("KV cache: %s", room.describe(num_tokens))
    return make()


def _make(
    verifier: Verifier,
    drafters: Mapping[str, Drafter],
    loaded: LoadedVerifier,
    config: EngineConfig,
) -> Round:
    model, eos_token_ids = verifier.model, loaded.eos_token_ids
    tools = wing_of(model.device).round_tools(model.dtype)
    if tools is None:
        return HostRound(verifier, drafters, eos_token_ids, config.synthetic_acceptance_rates)
    return DeviceRound(verifier, drafters, eos_token_ids, config, loaded.max_model_len, tools)
