"""A causal LM that drafts: what it guesses, and that its cache never holds a rejected draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from doubles import prompt_of, run
from tandem import ConfigError, DrafterMismatchError, Engine, EngineConfig, SamplingParams
from tandem.drafters.drafter import DraftRequest, GoesOn
from tandem.requests.sequence import Draft
from tiny_engines import DEVICE, MAX_LOOKAHEAD, Engines, TinyModels
from tiny_models import save_verifier

NUM_TOKENS = 30
REQUESTS = [
    (
        prompt_of(4 + 7 * seed),
        SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, seed=seed, ignore_eos=True),
    )
    for seed, temperature in enumerate([0.0, 1.3, 0.0, 1.3, 0.7, 1.3])
]


@pytest.mark.parametrize("name", ["llama", "gemma-3", "qwen-3", "gemma-4-E2B"])
def test_a_drafter_that_is_the_verifier_is_always_right(engines: Engines, name: str) -> None:
    """Greedy and, under shared noise, sampled; prompts are prefilled in chunks of 16 tokens."""
    engine = engines(name, causal_lm=name, max_num_batched_tokens=16)
    sequences = [engine.make_sequence(*request, drafter="causal_lm") for request in REQUESTS]
    run(engine, sequences)
    for sequence in sequences:
        assert sequence.num_accepted_tokens == sequence.num_draft_tokens > 0


def test_guesses_are_the_draft_models_own(
    engines: Engines, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After rejections, full acceptance, plain steps, and rounds of different lengths."""
    engine = engines("llama", causal_lm="qwen-3")
    drafter = engine.drafters["causal_lm"]
    model = tiny.reference("qwen-3")
    rounds: list[tuple[list[int], list[int]]] = []
    real, number = drafter.propose, 0

    def propose(requests: list[DraftRequest], goes_on: GoesOn) -> list[Draft]:
        nonlocal number
        number += 1
        few = [DraftRequest(s, 1 + (number + s.id) % min(4, k)) for s, k in requests]
        drafts = real(few)
        for (sequence, _), draft in zip(few, drafts, strict=True):
            rounds.append((list(sequence.token_ids), draft.token_ids))
        return drafts if number % 3 else [Draft([]) for _ in drafts]

    monkeypatch.setattr(drafter, "propose", propose)
    prompts = [prompt for prompt, _ in REQUESTS]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    run(engine, [engine.make_sequence(p, params, drafter="causal_lm") for p in prompts])
    assert len(rounds) > 50
    for token_ids, draft in rounds:
        ids = list(token_ids)
        for token_id in draft:
            with torch.inference_mode():
                logits = model(torch.tensor([ids], device=DEVICE)).logits[0, -1]
            assert token_id == logits.argmax()
            ids.append(token_id)


def test_the_cache_counts_both_models(tiny: TinyModels) -> None:
    model = str(tiny.verifier("llama"))
    sizes = [
        Engine(
            EngineConfig(
                verifier=model,
                dtype="float32",
                drafters=drafters,
                max_model_len=64,
                kv_cache_tokens=256,
                enforce_eager=True,
            )
        )
        for drafters in ({}, {"causal_lm": {"model": model}})
    ]
    assert sizes[0].load.groups == sizes[1].load.groups
    draft_cache = sizes[1].drafters["causal_lm"]._cache  # type: ignore[attr-defined]
    assert draft_cache.groups == sizes[1].verifier.cache.groups
    assert draft_cache.num_bytes == sizes[1].verifier.cache.num_bytes


def test_a_model_with_another_vocabulary_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    verifier = str(tiny.verifier("llama"))

    def load(drafter: Path) -> Any:
        settings = {"causal_lm": {"model": str(drafter)}}
        return Engine(EngineConfig(verifier=verifier, dtype="float32", drafters=settings))

    other = save_verifier("qwen-3", tmp_path)
    config = json.loads((other / "config.json").read_text())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DrafterMismatchError, match=r"token \d+ is .* the same tokenizer"):
        load(other)
    with pytest.raises(ConfigError, match="causal_lm: model must be a directory or hub id"):
        EngineConfig(verifier=verifier, drafters={"causal_lm": {}})
    config["vocab_size"] = 400
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises((DrafterMismatchError, ConfigError, RuntimeError)):
        load(other)


def test_all_lookaheads_are_reached(engines: Engines) -> None:
    engine = engines("llama", causal_lm="llama")
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    sequence = engine.make_sequence(prompt_of(5), params, drafter="causal_lm")
    run(engine, [sequence])
    assert sequence.num_verify_steps == 1 + -(-(NUM_TOKENS - 1) // (MAX_LOOKAHEAD + 1))
