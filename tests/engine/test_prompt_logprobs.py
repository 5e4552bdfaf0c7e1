"""Log probabilities of prompts: transformers' own, however a prompt is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tandem import Engine, RequestOutput, SamplingParams
from tandem.acceptance import scoring
from tiny_engines import DEVICE, Engines, TinyModels

pytestmark = pytest.mark.both_wings

PROMPTS = [[5, 9, 77, 5, 9, 77, 31, 5, 9], list(range(3, 90)), [40], [8, 8]]
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=3)
GENERATE = SamplingParams(max_tokens=12, temperature=0.0, prompt_logprobs=3)


def expected(tiny: TinyModels, prompt: list[int]) -> torch.Tensor:
    """Of each token behind each prefix, `[len(prompt), vocab_size]`."""
    with torch.no_grad():
        logits = tiny.reference("llama")(torch.tensor([prompt], device=DEVICE)).logits
    return logits[0].float().log_softmax(dim=-1)


def check(tiny: TinyModels, prompt: list[int], output: RequestOutput) -> None:
    rows = expected(tiny, prompt)[:-1]
    assert [each.token_id for each in output.prompt_logprobs] == prompt[1:]
    for row, token_id, found in zip(rows, prompt[1:], output.prompt_logprobs, strict=True):
        assert found.logprob == pytest.approx(row[token_id].item(), abs=1e-5)
        assert found.rank == 1 + int((row > row[token_id]).sum())
        values, ids = row.topk(3)
        assert [token for token, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 16}], ids=["whole", "chunks"])
def test_they_are_the_models_own(
    engines: Engines, tiny: TinyModels, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "NUM_ROWS", 5)  # several pieces
    engine = engines("llama", **settings)
    for params in (SCORE, GENERATE):
        outputs = engine.generate(PROMPTS, params, drafter="ngram")
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            check(tiny, prompt, output)


def test_without_tokens_the_prompt_alone_is_computed(engines: Engines, tiny: TinyModels) -> None:
    for params in (SCORE, replace(SCORE, prompt_logprobs=None, logprobs=2)):
        for output in engines("llama").generate(PROMPTS, params):
            assert (output.token_ids, output.text) == ([], "")
            assert output.finish_reason == "length"
            assert not output.logprobs
    engine = engines("llama")
    longest = [7] * engine.max_model_len
    (output,) = engine.generate([longest], SCORE)
    check(tiny, longest, output)


def test_they_change_no_token(engines: Engines) -> None:
    """Beside others, of which some are sampled, with speculation and without."""
    engine = engines("llama")
    sampled = SamplingParams(max_tokens=12, seed=3)
    params = [sampled, GENERATE, sampled, replace(sampled, prompt_logprobs=0, logprobs=1)]
    plain = [replace(each, prompt_logprobs=None) for each in params]
    expected = [each.token_ids for each in engine.generate(PROMPTS, plain, drafter="none")]
    for drafter in ("none", "ngram"):
        outputs = list(engine.generate(PROMPTS, params, drafter=drafter))
        assert [each.token_ids for each in outputs] == expected
        lengths = [0, len(PROMPTS[1]) - 1, 0, len(PROMPTS[3]) - 1]
        assert [len(each.prompt_logprobs) for each in outputs] == lengths


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    return list(engine.generate(prompts, params, drafter="none"))


def test_what_is_cached_is_computed_again(engines: Engines, tiny: TinyModels) -> None:
    engine = engines("llama", enable_prefix_caching=True)
    prompt = PROMPTS[1]
    for _ in range(2):
        (output,) = run(engine, [prompt], GENERATE)
        check(tiny, prompt, output)
        assert output.num_cached_tokens == 0
    # What it has computed serves others.
    (other,) = run(engine, [prompt], replace(GENERATE, prompt_logprobs=None))
    assert other.num_cached_tokens == 84
    assert other.token_ids == output.token_ids


def test_preempted_prompts(engines: Engines, tiny: TinyModels) -> None:
    engine = engines("llama", kv_cache_tokens=160, max_model_len=128)
    before = engine.load.num_preemptions
    prompts = [[first, *range(3, 60)] for first in (11, 12, 13)]
    outputs = run(engine, prompts, replace(GENERATE, max_tokens=40, ignore_eos=True))
    assert engine.load.num_preemptions > before
    for prompt, output in zip(prompts, outputs, strict=True):
        check(tiny, prompt, output)
