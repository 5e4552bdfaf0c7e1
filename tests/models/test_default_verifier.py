"""The default verifier and drafters: greedy text and likelihoods are transformers' own.

Drafting changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem import Engine, EngineConfig, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
GEMMA = ROOT / ".models/gemma-3-270m"
NUM_TOKENS = 32
# Far below what is measured: a drafter that reads the wrong K/V or state reaches 1.1 at best.
MIN_ACCEPTANCE_LENGTH = 1.4
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    '{"id": 1, "city": "Paris"}\n{"id": 2, "city": "Rome"}\n{"id": 3,',
    "It was late in the evening when the old sailor finally began to tell his story.",
]


@pytest.mark.slow
def test_default_verifier_greedy_and_sampled() -> None:
    config = EngineConfig.from_json(ROOT / "model_repository/tandem/1/model.json")
    assert config.drafter_name == "mtp"
    engine = Engine(replace(config, dtype="float32", max_num_seqs=4, max_model_len=256))
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    sampled = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=3, ignore_eos=True)
    for params in (greedy, sampled):
        outputs = {
            drafter: list(engine.generate(PROMPTS, params, drafter=drafter))
            for drafter in ("none", "ngram", "mtp")
        }
        plain, by_ngram, by_mtp = ([o.token_ids for o in texts] for texts in outputs.values())
        assert by_ngram == by_mtp == plain
        accepted = sum(output.num_accepted_tokens for output in outputs["mtp"])
        drafts = sum(output.num_drafts for output in outputs["mtp"])
        assert 1 + accepted / drafts > MIN_ACCEPTANCE_LENGTH
        if params is greedy:
            expected = plain
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    scores = [output.prompt_logprobs for output in engine.generate(PROMPTS, scored)]
    engine.check_integrity()
    assert engine.load.num_blocks_used == 0

    assert engine.tokenizer is not None
    model = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32).eval()
    for prompt, token_ids, found in zip(PROMPTS, expected, scores, strict=True):
        ids = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            rows = model(ids).logits[0, :-1].log_softmax(dim=-1)
        likelihood = rows.gather(1, ids[0, 1:].unsqueeze(1)).sum().item()
        assert sum(each.logprob for each in found) == pytest.approx(likelihood, abs=1e-3)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
        )
        assert output[0, ids.shape[1] :].tolist() == token_ids
