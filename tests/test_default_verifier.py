"""The real default verifier: greedy text is transformers' own, and drafting changes none of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem import Engine, EngineConfig, SamplingParams

GEMMA = Path(__file__).resolve().parents[1] / ".models/gemma-3-270m"
NUM_TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    '{"id": 1, "city": "Paris"}\n{"id": 2, "city": "Rome"}\n{"id": 3,',
    "It was late in the evening when the old sailor finally began to tell his story.",
]


@pytest.mark.slow
def test_default_verifier_greedy_and_sampled() -> None:
    engine = Engine(
        EngineConfig(
            verifier=str(GEMMA),
            dtype="float32",
            drafters={"ngram": {"num_speculative_tokens": 4}},
            max_num_seqs=4,
            max_model_len=256,
        )
    )
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    sampled = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=3, ignore_eos=True)
    for params in (greedy, sampled):
        plain, drafted = (
            [output.token_ids for output in engine.generate(PROMPTS, params, drafter=drafter)]
            for drafter in ("none", "ngram")
        )
        assert drafted == plain
        if params is greedy:
            expected = plain
    engine.check_integrity()
    assert engine.load.num_blocks_used == 0

    assert engine.tokenizer is not None
    model = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32).eval()
    for prompt, token_ids in zip(PROMPTS, expected, strict=True):
        ids = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
        )
        assert output[0, ids.shape[1] :].tolist() == token_ids
