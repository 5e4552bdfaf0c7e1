"""Keyed noise, the filters, and the law of what the engine samples."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation import TopPLogitsWarper

import tandem.sampling.sample as sampling
from doubles import prompt_of, run
from tandem import SamplingParams
from tandem.sampling.noise import block_gumbel, gumbel, splitmix64
from tandem.sampling.sample import Draw, sample
from tiny_engines import TinyModels

MASK = 2**64 - 1


def reference_splitmix64(state: int, index: int) -> int:
    z = (state + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_known_answers() -> None:
    found = splitmix64(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value & MASK for value in found.tolist()] == known


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20))
def test_splitmix64_equals_the_reference(state: int, index: int) -> None:
    found = splitmix64(torch.tensor([state]), torch.tensor([index])).item()
    assert int(found) & MASK == reference_splitmix64(state & MASK, index)


def test_noise_is_standard_gumbel() -> None:
    """Fixed keys, so this never fails by chance; a wrong law is seen at once with 100,000 draws."""
    noise = gumbel(torch.arange(100)[:, None], torch.arange(1000)).flatten()
    assert noise.isfinite().all()
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


def reference_gumbel(key: int, token: int) -> float:
    def exponential(index: int) -> float:
        return -math.log(1 - ((reference_splitmix64(key, index) >> 32) + 0.5) * 2**-32)

    block = -1 - token // 256
    smallest = exponential(block) / 256
    is_owner = reference_splitmix64(key, block) % 256 == token % 256
    return -math.log(smallest if is_owner else smallest + exponential(token))


def test_noise_is_rounded_once() -> None:
    """So that a logarithm that is right to nearly the last digit of a float64 gives its bits."""
    keys = splitmix64(torch.arange(40), torch.tensor(5))
    tokens = torch.arange(0, 262144, 977)
    expected = [[reference_gumbel(key & MASK, t) for t in tokens.tolist()] for key in keys.tolist()]
    assert torch.equal(gumbel(keys[:, None], tokens), torch.tensor(expected))


def test_noise_of_tokens_in_a_block_is_independent() -> None:
    """Tokens draw their noise under their block's largest; together they must not show it."""
    keys = torch.arange(20_000)[:, None]
    noise = gumbel(keys, torch.arange(3, 256, 50)).double()
    uniform = (-(-noise).exp()).exp()
    bins = (uniform[:, 0] * 8).long() * 8 + (uniform[:, 1] * 8).long()
    assert stats.chisquare(bins.bincount(minlength=64).numpy()).pvalue > 1e-3
    largest = gumbel(keys[:4000], torch.arange(256)).amax(dim=1)
    assert stats.kstest((largest - math.log(256)).numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    others = torch.corrcoef(noise.T) - torch.eye(noise.shape[1])
    assert others.abs().max() < 4 / math.sqrt(len(noise))


def test_a_blocks_largest_noise_is_what_its_tokens_have() -> None:
    keys, tokens = torch.arange(50)[:, None], torch.arange(1024)
    largest, owner = block_gumbel(keys, torch.arange(4))
    noise = gumbel(keys, tokens).view(50, 4, 256)
    assert torch.equal(noise.amax(dim=-1), largest)
    assert torch.equal(noise.argmax(dim=-1), owner)
    assert len(owner.unique()) > 100


def draws_for(rows: int, **params: Any) -> list[Draw]:
    return [Draw(SamplingParams(**params), seed=row, position=row * 7) for row in range(rows)]


def reference(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """transformers' own filters, then noise on every token of the vocabulary."""
    chosen = []
    for row, draw in zip(logits, draws, strict=True):
        params, scores = draw.params, row[None].float()
        warpers = [TemperatureLogitsWarper(params.temperature)]
        warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
        warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
        for warper in warpers:
            scores = warper(None, scores)
        key = splitmix64(torch.tensor([draw.seed]), torch.tensor([draw.position]))
        noise = gumbel(key[:, None], torch.arange(scores.shape[1]))
        chosen.append(int((scores + noise).argmax()))
    return chosen


@pytest.mark.parametrize("vocab_size", [7, 384, 1000, 32768])
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
)
def test_sample_equals_transformers_filters_with_noise_on_all_tokens(
    vocab_size: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    spread: float,
) -> None:
    """Noise on candidates alone, and candidates from blocks alone, change no choice."""
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    draws = draws_for(4, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert sample(logits, draws).tolist() == reference(logits, draws)


@pytest.mark.parametrize("vocab_size", [262144, 50257])
def test_sample_of_a_whole_vocabulary_in_bfloat16(vocab_size: int) -> None:
    """Whole blocks of 256 tokens and a size that leaves a rest; ties abound in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, vocab_size, generator=generator) * 4).bfloat16()
    limits = [{}, {"top_k": 64}, {"min_p": 0.1}, {"top_p": 0.5}, {"top_k": 900, "top_p": 0.9}]
    for params in (*limits, {"top_p": 0.999}):
        draws = draws_for(3, temperature=1.0, **params)
        assert sample(logits, draws).tolist() == reference(logits, draws)


@pytest.mark.parametrize("num_tied", [90, 2000])
def test_all_that_tie_with_the_last_of_top_k_stay(num_tied: int) -> None:
    """As in transformers, and top-p is a share of them all, though fewer are sorted at first."""
    logits = torch.randn(40, 50257, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[:, 100 : 100 + num_tied] = 9.0
    draws = draws_for(40, temperature=1.0, top_k=10)
    found = sample(logits, draws).tolist()
    assert found == reference(logits, draws)
    assert max(found) > 100 + num_tied / 2

    logits[:, :2] = torch.tensor([12.0, 11.5])
    mass = 1 + math.exp(-0.5) + num_tied * math.exp(-3)
    draws = draws_for(40, temperature=1.0, top_k=10, top_p=1.1 / mass)
    assert set(sample(logits, draws).tolist()) == {0, 1}


@pytest.mark.parametrize("params", [{"top_k": 64}, {"top_p": 0.9}, {"top_k": 64, "top_p": 0.9}])
def test_where_few_tokens_are_allowed_few_are_sorted(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a grammar leaves them."""
    logits = torch.full((4, 32768), -torch.inf)
    logits[:, 5:15] = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    draws = draws_for(4, temperature=1.0, **params)
    counts = []
    largest = sampling._largest
    monkeypatch.setattr(
        sampling, "_largest", lambda *given: (counts.append(given[-1]), largest(*given))[1]
    )
    assert sample(logits, draws).tolist() == reference(logits, draws)
    assert counts == [128]


def test_rows_that_are_not_numbers_get_a_token_all_the_same() -> None:
    """The engine ends such a request by itself; a drafter's guess only has to be a token."""
    logits = torch.randn(3, 384, generator=torch.Generator().manual_seed(1))
    draws = draws_for(3, temperature=1.0)
    expected = sample(logits, draws).tolist()
    logits[1] = float("nan")
    found = sample(logits, draws).tolist()
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert 0 <= found[1] < 384
    ids = torch.arange(100, 484).expand(3, -1)
    assert 100 <= sample(logits, draws, ids)[1] < 484


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = torch.randn(6, 384, generator=torch.Generator().manual_seed(1)) * 3
    draws = draws_for(6, temperature=1.0, top_k=9)
    draws[::2] = draws_for(3, temperature=0.0)
    expected = reference(logits[1::2], draws[1::2])
    found = sample(logits, draws).tolist()
    assert found[1::2] == expected
    assert found[::2] == logits[::2].argmax(dim=-1).tolist()


def test_candidates_keep_the_noise_of_their_token() -> None:
    """Any subset and order of candidates that holds the winner chooses the same token."""
    logits = torch.randn(5, 384, generator=torch.Generator().manual_seed(2)) * 2
    draws = draws_for(5, temperature=1.3)
    whole = sample(logits, draws)
    order = torch.randperm(384, generator=torch.Generator().manual_seed(3))
    ids = order.expand(5, -1)
    assert sample(logits.gather(1, ids), draws, ids).tolist() == whole.tolist()


@pytest.mark.parametrize("drafter", ["none", "mtp"])
def test_the_sampled_law_is_the_verifiers(engines: Any, tiny: TinyModels, drafter: str) -> None:
    """Three tokens in a row, jointly, over 800 seeds, against the exact probabilities.

    With a drafter, three more tokens leave room for four drafts from the second token on. The
    seeds are fixed, so nothing here is left to chance; with other seeds a right engine would fail
    once in 1,000 times.
    """
    name, prompt, num_seeds = "gemma-4-31B", prompt_of(5), 800
    engine = engines(name, mtp=True, max_num_seqs=96, max_num_batched_tokens=1024)
    max_tokens = 6 if drafter == "mtp" else 3
    params = {"max_tokens": max_tokens, "temperature": 1.3, "top_k": 3, "ignore_eos": True}
    sequences = [
        engine.make_sequence(
            prompt,
            SamplingParams(seed=seed, **params),
            drafter=drafter,
            num_speculative_tokens=4,
        )
        for seed in range(num_seeds)
    ]
    run(engine, sequences, max_steps=4000)
    if drafter == "mtp":
        assert sum(sequence.num_draft_tokens for sequence in sequences) >= 4 * num_seeds
    found = Counter(tuple(sequence.output_ids[:3]) for sequence in sequences)

    model = tiny.reference(name)

    def next_tokens(prefix: tuple[int, ...]) -> list[tuple[int, float]]:
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *prefix]], device=model.device)
            logits = model(input_ids=ids).logits[0, -1].float().cpu()
        values, tokens = (logits / 1.3).topk(3)
        return list(zip(tokens.tolist(), values.softmax(dim=-1).tolist(), strict=True))

    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        expected = {
            (*prefix, token): probability * conditional
            for prefix, probability in expected.items()
            for token, conditional in next_tokens(prefix)
        }
    assert set(found) <= set(expected)
    # Cells with few expected counts go together, as the test demands.
    large = {key: p for key, p in expected.items() if p * num_seeds >= 5}
    counts = [found[key] for key in large]
    chances = [p * num_seeds for p in large.values()]
    rest = num_seeds - sum(chances)
    if rest > 1e-6:
        counts.append(num_seeds - sum(counts))
        chances.append(rest)
    # Chances in float32 may add up to a little more than 1.
    scale = sum(counts) / sum(chances)
    assert stats.chisquare(counts, [scale * chance for chance in chances]).pvalue > 1e-3


def test_each_seed_and_position_has_noise_of_its_own() -> None:
    logits = torch.zeros(64, 384)
    params = SamplingParams(temperature=1.0)
    draws = [Draw(params, seed, position) for seed, position in product(range(8), range(8))]
    assert len(set(sample(logits, draws).tolist())) > 48
