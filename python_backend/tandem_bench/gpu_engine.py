"""The engine on models of published shapes whose weights are random: what its steps take.

Drafts are accepted by coin (`synthetic_acceptance_rates`), since random models agree on nothing.
Beside it stands transformers' `generate` with the same weights.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from transformers import (
    AutoModelForCausalLM,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
)

from tandem import Engine, EngineConfig, SamplingParams
from tandem.metrics import PHASES
from tandem.rounds.device import DeviceRound
from tandem_bench.drive import closed_loop

_CONCURRENCIES = (1, 4, 16, 64)
_PROMPT, _ANSWER = 200, 64
_COMMON: dict[str, Any] = {
    "vocab_size": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 0,
}


@dataclass(frozen=True)
class Pair:
    """A verifier and its assistant, by their sizes.

    Attributes:
        rates: the share of rounds in which the draft at each place is accepted.
        said: where that is from.
    """

    name: str
    verifier: dict[str, Any]
    assistant: dict[str, Any]
    rates: tuple[float, ...]
    said: str
    changes: dict[str, Any] = field(default_factory=dict)


def layer_types(count: int, period: int) -> list[str]:
    """The last of each period has no window."""
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return [kinds[number % period] for number in range(count)]


PAIRS = (
    Pair(
        "Gemma 4 E2B",
        {
            **_COMMON,
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "num_hidden_layers": 35,
            "layer_types": layer_types(35, 5),
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 256,
            "final_logit_softcapping": 30.0,
        },
        {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
        (0.7, 0.5),
        "acceptance assumed",
        {"use_ordered_embeddings": True, "num_centroids": 2048, "centroid_intermediate_top_k": 32},
    ),
    # All 60 would not fit on the disk that they go by.
    Pair(
        "12 of the 60 layers of Gemma 4 31B",
        {
            **_COMMON,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "num_hidden_layers": 12,
            "layer_types": layer_types(12, 6),
            "final_logit_softcapping": 30.0,
        },
        {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 32},
        # With 7 drafts their mean length is the published one, 5.37.
        tuple(round(0.882**count, 3) for count in range(1, 8)),
        "acceptance of a published mean length",
    ),
)
TINY: dict[str, Any] = {
    "vocab_size": 384,
    "vocab_size_per_layer_input": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 24,
    "num_attention_heads": 4,
}
TINY_CHANGES = {"num_centroids": 24, "centroid_intermediate_top_k": 6}


def run(is_dry: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Tokens a second, milliseconds of each phase and of each program on the device.

    For each pair, drafter and concurrency, and of transformers.
    """
    for pair in PAIRS[:1] if is_dry else PAIRS:
        name = f"{'tiny ' * is_dry}{pair.name}"
        concurrencies = (1, 2) if is_dry else _CONCURRENCIES
        with tempfile.TemporaryDirectory() as folder:
            config = save(pair, Path(folder), is_dry)
            for concurrency in concurrencies[::2]:
                cell = generate(Path(folder), concurrency, is_dry)
                yield f"{name}, transformers, {concurrency} at a time", cell
            started = time.perf_counter()
            engine = Engine(config)
            print(f"{name}: loaded in {time.perf_counter() - started:.0f} s", flush=True)
        for concurrency in concurrencies:
            for drafter in ("none", "mtp"):
                cell = measure(engine, drafter, concurrency, is_dry)
                said = "none" if drafter == "none" else f"{drafter} ({pair.said})"
                yield f"{name}, {said}, {concurrency} at a time", cell
        del engine
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(folder: Path, concurrency: int, is_dry: bool) -> dict[str, float]:
    """Tokens a second of transformers' `generate`, greedy, for prompts of one length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "verifier", dtype="auto")
    model.to(device)
    length, num_tokens = (10, 8) if is_dry else (_PROMPT, _ANSWER)
    token_ids = torch.tensor(_prompts(concurrency, length), device=device)
    took = 0.0
    for count in (4, num_tokens):  # the first warms up
        started = time.perf_counter()
        output = model.generate(
            token_ids, do_sample=False, min_new_tokens=count, max_new_tokens=count
        )
        output.tolist()
        took = time.perf_counter() - started
    del model
    _free()
    return {"tokens_per_second": round(concurrency * num_tokens / took, 2)}


def _prompts(count: int, length: int) -> list[list[int]]:
    return [[3 + (7 * number + n) % 300 for n in range(length)] for number in range(count)]


def save(pair: Pair, folder: Path, is_dry: bool) -> EngineConfig:
    """Writes checkpoints to `folder`; the configuration of an engine on them."""
    config, assistant = configs(pair, TINY if is_dry else {}, TINY_CHANGES if is_dry else {})
    _save(Gemma4ForCausalLM, config, folder / "verifier")
    _save(Gemma4AssistantForCausalLM, assistant, folder / "assistant")
    most = 2 if is_dry else max(_CONCURRENCIES)
    length = 64 if is_dry else 512
    return EngineConfig(
        verifier=str(folder / "verifier"),
        drafters={
            "mtp": {
                "model": str(folder / "assistant"),
                "num_speculative_tokens": len(pair.rates),
            }
        },
        max_num_seqs=most,
        max_model_len=length,
        kv_cache_tokens=most * length,
        max_num_batched_tokens=64 if is_dry else 2048,
        lookahead="fixed",
        enable_prefix_caching=False,
        synthetic_acceptance_rates=pair.rates,
    )


def configs(
    pair: Pair, sizes: dict[str, Any], changes: dict[str, Any]
) -> tuple[Gemma4TextConfig, Gemma4AssistantConfig]:
    """The configurations of a verifier and its assistant.

    Args:
        sizes: in place of the pair's, for both.
        changes: the same for the assistant's head.
    """
    config = Gemma4TextConfig(**{**pair.verifier, **sizes})
    text_config = Gemma4TextConfig(
        **{
            **pair.verifier,
            **pair.assistant,
            **sizes,
            "num_hidden_layers": 4,
            "layer_types": layer_types(4, 4),
            "num_kv_shared_layers": 4,
            "num_key_value_heads": config.per_layer_config[0].num_key_value_heads,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "final_logit_softcapping": None,
        }
    )
    assistant = Gemma4AssistantConfig(
        text_config=text_config,
        backbone_hidden_size=config.hidden_size,
        **{**pair.changes, **changes},
    )
    return config, assistant


def _save(kind: Any, config: Any, folder: Path) -> None:
    """A model whose weights were made on the device that it will run on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with torch.device(device):
        model = kind(config).to(config.dtype)
    if getattr(model, "masked_embedding", None) is not None:
        order = torch.randperm(config.text_config.vocab_size, device=device)
        model.masked_embedding.token_ordering.copy_(order)
    model.generation_config = GenerationConfig(eos_token_id=1, bos_token_id=2)
    model.save_pretrained(folder)


def measure(engine: Engine, drafter: str, concurrency: int, is_dry: bool) -> dict[str, float]:
    """One answer for each of the sequences that run at once."""
    length, num_tokens = (10, 8) if is_dry else (_PROMPT, _ANSWER)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    prompts = _prompts(concurrency, length)
    warm = dataclasses.replace(params, max_tokens=4)
    closed_loop(engine, prompts, warm, drafter, concurrency)
    done = closed_loop(engine, prompts, params, drafter, concurrency)
    written = sum(len(trace.token_ids) for trace in done.traces)
    phases = {f"ms_{name}": 1e3 * done.phases[name] / done.num_steps for name in PHASES}
    found = {
        "tokens_per_second": written / done.seconds,
        "tokens_a_step_each": written / done.num_steps / concurrency,
        **phases,
        **programs(engine, drafter, prompts, params),
    }
    return {name: round(value, 2) for name, value in found.items()}


def programs(
    engine: Engine, drafter: str, prompts: list[list[int]], params: SamplingParams
) -> dict[str, float]:
    """Milliseconds of what a step in the middle of all answers launches, each by itself."""
    round_ = engine.round
    assert isinstance(round_, DeviceRound)
    sequences = [engine.make_sequence(prompt, params, drafter=drafter) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while any(not sequence.is_decoding for sequence in sequences):
        engine.step()
    with torch.inference_mode():
        batch = engine.schedule()
        depth = max(scheduled.num_draft_tokens for scheduled in batch)
        engine.draft(batch)
        size, launched = round_.size, round_.programs
        verified = launched.verify(size)
        found = {
            "rows": float(size.num_rows),
            "ms_verify_program": 1e3 * seconds(lambda: launched.verify(size)),
            "ms_accept_program": 1e3
            * seconds(lambda: launched.accept(size, verified, adjusts=False)),
            "ms_draft_program": 0.0,
        }
        if depth:
            found["ms_draft_program"] = 1e3 * seconds(lambda: launched.draft(0, len(batch), depth))
    for sequence in sequences:
        engine.cancel(sequence)
    engine.step()
    return found


def seconds(work: Callable[[], object]) -> float:
    """The median of some runs, with nothing of the last one in the caches."""
    if torch.cuda.is_available():
        return float(triton.testing.do_bench(work, warmup=10, rep=50, return_mode="median")) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
