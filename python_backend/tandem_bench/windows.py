"""What a cache that frees what is behind a window saves: against one that keeps all, in turns.

Both engines have the same weights and, for conversations, caches of the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from tandem import Engine, EngineConfig, SamplingParams, Sequence
from tandem.cache.kv_cache import LayerShape
from tandem.cache.room import CacheRoom
from tandem.models.probing import probe
from tandem_bench.figures import median
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar, turned
from tandem_bench.workload import repeat_to_fill

PART = "windows"
_PLAIN: dict[str, Any] = {"drafters": {}, "default_drafter": None}
# Conversations of this many tokens are stored.
_NUM_STORED, _STORED, _WRITTEN = 16, 8192, 400
# Those that are served: a prompt and an answer, more than find room.
_NUM_SERVED, _PROMPT, _ANSWER = 24, 3000, 100
_MOST_SERVED, _LONGEST = 8, 4096
_CACHE_TOKENS = 3 * 4096
_CONCURRENCIES = (1, 4, 16)
_STEPS, _SHORT_ROUNDS = 40, 8
_NUM_TURNS, _TURN = 20, 120
# Of the published Gemma 4 models, what their caches depend on; everything else is small.
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "head_dim": 256,
    "global_head_dim": 512,
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "Gemma 4 E2B": {
        "num_hidden_layers": 35,
        "period": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "num_kv_shared_layers": 20,
        "hidden_size_per_layer_input": 8,
    },
    "Gemma 4 31B": {
        "num_hidden_layers": 60,
        "period": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
}


def run(settings: Settings) -> None:
    """Measures what is not in `windows.json` yet."""
    results = settings.results(PART, ())
    runs = {
        "stored": stored,
        "published": published,
        "served": served,
        "short": short,
        "chat": chat,
    }
    todo = [name for name in runs if name not in results]
    with bar(PART, len(todo), results) as shown:
        for name in todo:
            shown.say(name)
            cell, around = undisturbed(partial(runs[name], settings))
            results.put(name, {**cell, **around})
            shown.advance()


@contextmanager
def without_windows() -> Iterator[None]:
    """Engines that load meanwhile keep all K/V of all layers."""
    with patch("tandem.cache.room.windows_of", lambda *_: [None]):
        yield


def load(name: str, config: EngineConfig) -> Engine:
    """An engine that frees what is behind a window ("after"), or keeps it ("before")."""
    with without_windows() if name == "before" else nullcontext():
        return Engine(config)


def bytes_used(engine: Engine) -> int:
    """Of blocks that belong to sequences."""
    cache = engine.verifier.cache
    total = 0
    for number, group in enumerate(engine.load.groups.values()):
        each = sum(
            2 * cache.layer(n)[0][0].numel() * cache.layer(n)[0].element_size()
            for n in cache.layers
            if cache.group_of_layer(n) == number
        )
        total += group.num_used * cache.block_size * each
    return total


def stored(settings: Settings) -> dict[str, float]:
    """Bytes of conversations that are in the cache, at their ends."""
    config = settings.engine_config(
        max_num_seqs=_NUM_STORED, max_model_len=_STORED, **_PLAIN, kv_cache_tokens=None
    )
    found: dict[str, float] = {}
    for name in ("after", "before"):
        engine = load(name, config)
        # The last tokens are written, so that nobody has ended before all have begun.
        text = _text(settings, _STORED - _WRITTEN)
        params = SamplingParams(max_tokens=_WRITTEN, temperature=0.0, ignore_eos=True)
        sequences = [engine.make_sequence(turned(text, n), params) for n in range(_NUM_STORED)]
        for sequence in sequences:
            engine.add(sequence)
        most = 0
        while not any(sequence.is_finished for sequence in sequences):
            most = max(most, bytes_used(engine))
            engine.step()
        cancel(engine, [s for s in sequences if not s.is_finished])
        found[f"mib_used_{name}"] = round(most / 2**20, 1)
        found[f"mib_allocated_{name}"] = round(engine.verifier.cache.num_bytes / 2**20, 1)
        del engine
    found["ratio"] = round(found["mib_used_after"] / found["mib_used_before"], 3)
    return found


def published(settings: Settings) -> dict[str, float]:
    """Bytes of a cache for as many conversations, computed by the same code; nothing is loaded."""
    found: dict[str, float] = {}
    config = settings.engine_config(max_num_seqs=_NUM_STORED, max_model_len=_STORED)
    for name, shape in _PUBLISHED.items():
        values = dict(shape)
        period, count = values.pop("period"), values["num_hidden_layers"]
        kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
        values["layer_types"] = [kinds[n % period] for n in range(count)]
        text = Gemma4TextConfig(**values | _SMALL)
        model = AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16)
        shapes, _ = probe(model)
        tokens = _NUM_STORED * _STORED
        sizes = []
        for windows in ("before", "after"):
            with without_windows() if windows == "before" else nullcontext():
                sizes.append(
                    CacheRoom(shapes, _STORED, torch.bfloat16, config).num_bytes(tokens) / 2**30
                )
        found[f"{name}: gib_allocated_before"] = round(sizes[0], 2)
        found[f"{name}: gib_allocated_after"] = round(sizes[1], 2)
        found[f"{name}: ratio"] = round(sizes[1] / sizes[0], 3)
    return found


def served(settings: Settings) -> dict[str, float]:
    """Long conversations, all sent at once, in caches of the same bytes."""
    config = settings.engine_config(max_num_seqs=_MOST_SERVED, max_model_len=_LONGEST, **_PLAIN)
    before = load("before", replace(config, kv_cache_tokens=_CACHE_TOKENS))
    most = before.verifier.cache.num_bytes
    after = load("after", replace(config, kv_cache_tokens=_tokens_of(before, config, most)))
    found: dict[str, list[float]] = {}
    params = SamplingParams(max_tokens=_ANSWER, temperature=0.0, ignore_eos=True)
    for number in range(settings.rounds):
        for name, engine in turned(list({"before": before, "after": after}.items()), number):
            text = _text(settings, _PROMPT)
            sequences = [engine.make_sequence(turned(text, n), params) for n in range(_NUM_SERVED)]
            preempted, started = engine.load.num_preemptions, time.perf_counter()
            for sequence in sequences:
                engine.add(sequence)
            running = []
            while engine.has_work:
                engine.step()
                running.append(engine.load.num_running)
            seconds = time.perf_counter() - started
            figures = {
                "mib": engine.verifier.cache.num_bytes / 2**20,
                "most_at_once": max(running),
                "mean_at_once": sum(running) / len(running),
                "preemptions": engine.load.num_preemptions - preempted,
                "tokens_per_second": _NUM_SERVED * _ANSWER / seconds,
            }
            for figure, value in figures.items():
                found.setdefault(f"{figure}_{name}", []).append(value)
    return {figure: round(median(values), 2) for figure, values in found.items()}


def _tokens_of(before: Engine, config: EngineConfig, num_bytes: int) -> int:
    """Tokens of context for which so many bytes are enough with windows."""
    model, cache = before.verifier.model, before.verifier.cache
    text: Any = model.config.get_text_config()
    windows = {"sliding_attention": text.sliding_window}
    shapes = []
    for layer in cache.layers:
        _, num_kv_heads, head_dim = cache.layer(layer)[0].shape
        window = windows.get(text.layer_types[layer])
        shapes.append(LayerShape(layer, num_kv_heads, head_dim, window))
    return CacheRoom(shapes, before.max_model_len, model.dtype, config).num_tokens(num_bytes)


def short(settings: Settings) -> dict[str, float]:
    """How long steps take at short contexts.

    Of equal engines in a process the first is slower, by where its weights lie, and a later one a
    little faster. So the first is not measured, and the others are loaded in an order that favours
    none.
    """
    config = settings.engine_config(max_num_seqs=max(_CONCURRENCIES))
    order = ("before", "before", "after", "after", "before")
    loaded = [(name, load(name, config)) for name in order]
    found: dict[str, float] = {}
    texts = repeat_to_fill(settings.prompts(), max(_CONCURRENCIES))
    params = SamplingParams(max_tokens=4 * _STEPS, temperature=0.0, ignore_eos=True)
    for count in _CONCURRENCIES:
        times: dict[str, list[float]] = {"before": [], "after": []}
        for number in range(_SHORT_ROUNDS):
            for name, engine in turned(loaded[1:], number):
                sequences = [
                    engine.make_sequence(text, params, drafter="none") for text in texts[:count]
                ]
                for sequence in sequences:
                    engine.add(sequence)
                while not all(sequence.is_decoding for sequence in sequences):
                    engine.step()
                steps = []
                for _ in range(_STEPS):
                    started = time.perf_counter()
                    engine.step()
                    steps.append(time.perf_counter() - started)
                times[name].append(1e3 * median(steps))
                cancel(engine, sequences)
        for name, each in times.items():
            found[f"{count}: step_ms_{name}"] = round(sum(each) / len(each), 2)
    return found


def chat(settings: Settings) -> dict[str, float]:
    """A conversation of many turns: what the prefix cache has of each, and its first tokens."""
    config = settings.engine_config(
        max_num_seqs=16, max_model_len=_LONGEST, enable_prefix_caching=True, **_PLAIN
    )
    found: dict[str, float] = {}
    for name in ("before", "after"):
        engine = load(name, config)
        text = _text(settings, _TURN * _NUM_TURNS)
        token_ids: list[int] = []
        shares, firsts = [], []
        for turn in range(_NUM_TURNS):
            known = len(token_ids)
            token_ids = token_ids + text[turn * _TURN // 2 : (turn + 1) * _TURN // 2]
            params = SamplingParams(max_tokens=_TURN // 2, temperature=0.0, ignore_eos=True)
            (sequence,) = [engine.make_sequence(token_ids, params)]
            started, first = time.perf_counter(), 0.0
            engine.add(sequence)
            while engine.has_work:
                engine.step()
                if not first and sequence.num_output_tokens:
                    first = time.perf_counter() - started
            if turn:
                shares.append(sequence.num_cached_tokens / known)
                firsts.append(1e3 * first)
            token_ids = sequence.token_ids
        found[f"tokens_at_the_end_{name}"] = len(token_ids)
        found[f"least_share_of_a_turn_found_{name}"] = round(min(shares), 3)
        found[f"median_ms_to_first_token_{name}"] = round(median(firsts), 1)
        found[f"most_ms_to_first_token_{name}"] = round(max(firsts), 1)
    return found


def _text(settings: Settings, length: int) -> list[int]:
    tokens = [token for prompt in settings.prompts() for token in prompt]
    return (tokens * -(-length // len(tokens)))[:length]


def cancel(engine: Engine, sequences: Items[Sequence]) -> None:
    """Ends them."""
    for sequence in sequences:
        engine.cancel(sequence)
    engine.step()
