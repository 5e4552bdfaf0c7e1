"""Requests that begin alike share K/V, and nobody sees it but in what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from block_tables import blocks_of
from doubles import HalfDrafter, WrongDrafter, plain, prompt_of, run, send
from tandem import Engine, InvalidRequestError, SamplingParams, Sequence
from tandem.requests.sequence import Draft
from tiny_engines import Engines, config_of
from tiny_models import ASSISTANTS, VERIFIERS, save_verifier

BLOCK_SIZE = 4  # of the tiny engines
NUM_TOKENS = 20
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.2, seed=3)
SHARED = prompt_of(42)
# Prompts that share 42 tokens, or a part of them, or that are a part of others.
REQUESTS = [
    (prompt, params)
    for params in (GREEDY, SAMPLED)
    for prompt in (
        [*SHARED, *prompt_of(5, seed=1)],
        [*SHARED, *prompt_of(11, seed=2)],
        [*SHARED[:30], *prompt_of(20, seed=3)],
        SHARED,
        SHARED[:BLOCK_SIZE],
        [*SHARED[1:], *prompt_of(5, seed=1)],
    )
]


@pytest.fixture
def make_cached(engines: Engines) -> Iterator[Callable[..., Engine]]:
    """Makes tiny engines of a test's own with the cache on; in the end all blocks must be free."""
    made: list[Engine] = []

    def make(name: str, **settings: Any) -> Engine:
        made.append(engines.make(name, **{"enable_prefix_caching": True, **settings}))
        return made[-1]

    yield make
    for engine in made:
        assert not engine.has_work
        engine.check_integrity()
        assert engine.load.num_blocks_used == 0


def send_each(engine: Engine, **options: Any) -> list[Sequence]:
    """Every request by itself, one after the other, and again."""
    return [send(engine, request, **options)[0] for request in (*REQUESTS, *REQUESTS)]


def expected_of(engines: Engines, verifier: str) -> list[list[int]]:
    """The outputs of `send_each` without cache and drafters."""
    return 2 * [plain(engines(verifier), [request])[0] for request in REQUESTS]


def full_blocks(num_tokens: int) -> int:
    """Tokens that can be found of `num_tokens` that are all in the cache."""
    return (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.slow
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_every_verifier_writes_the_same_with_the_cache(
    engines: Engines, make_cached, verifier: str
) -> None:
    """One after the other, and then all at once in a batch that shares blocks in use."""
    engine = make_cached(verifier)
    expected = expected_of(engines, verifier)
    sequences = send_each(engine)
    assert [s.output_ids for s in sequences] == expected
    for one in sequences[len(REQUESTS) :]:
        assert one.num_cached_tokens == full_blocks(one.num_prompt_tokens)
    together = send(engine, *REQUESTS)
    assert [s.output_ids for s in together] == expected[: len(REQUESTS)]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram", "mtp", "causal_lm", "ngram+mtp", "ngram+causal_lm"])
def test_every_drafter_writes_the_same_with_the_cache(
    engines: Engines, make_cached, drafter: str
) -> None:
    engine = make_cached("gemma-4-31B", mtp=True, causal_lm="llama", max_num_batched_tokens=16)
    expected = expected_of(engines, "gemma-4-31B")
    sequences = send_each(engine, drafter=drafter)
    assert [s.output_ids for s in sequences] == expected
    for one in sequences[len(REQUESTS) :]:
        assert one.num_cached_tokens == full_blocks(one.num_prompt_tokens)
    assert sum(s.num_draft_tokens for s in sequences) > 0
    together = send(engine, *REQUESTS, drafter=drafter)
    assert [s.output_ids for s in together] == expected[: len(REQUESTS)]


@pytest.mark.parametrize("verifier", ASSISTANTS)
def test_every_assistant_guesses_the_same_with_the_cache(
    engines: Engines, make_cached, verifier: str
) -> None:
    """It reads the verifier's K/V, and its first state is that of a token that was computed."""
    requests = [REQUESTS[0], (REQUESTS[1][0], SAMPLED), REQUESTS[0]]
    found = []
    for engine in (engines(verifier, mtp=True), make_cached(verifier, mtp=True)):
        sequences = [send(engine, one, drafter="mtp")[0] for one in requests]
        found.append([(s.output_ids, s.num_draft_tokens, s.num_accepted_tokens) for s in sequences])
    assert found[0] == found[1]
    assert sequences[-1].num_cached_tokens > 0


@pytest.mark.parametrize("drafter", ["wrong", "half"])
def test_rejected_drafts_are_never_shared(
    engines: Engines, make_cached, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """A second turn goes on from an answer whose blocks all held rejected drafts for a while."""
    engine = make_cached("llama")
    doubles = {"wrong": WrongDrafter, "half": HalfDrafter}
    prompt, params = REQUESTS[0][0], replace(SAMPLED, logprobs=0)
    (answer,) = plain(engines("llama"), [(prompt, params)])
    monkeypatch.setitem(engine.drafters, "ngram", doubles[drafter]({SAMPLED.seed: answer}))
    (first,) = send(engine, (prompt, params), drafter="ngram")
    assert first.output_ids == answer
    assert first.num_accepted_tokens < first.num_draft_tokens
    second = [*first.token_ids, *prompt_of(3, seed=9)]
    (expected,) = engines("llama").generate([second], params, drafter="none")
    (output,) = engine.generate([second], params, drafter="none")
    # The last token of an answer is never computed.
    assert output.num_cached_tokens == (first.num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert output.token_ids == expected.token_ids
    logprobs = [[each.logprob for each in one.logprobs] for one in (output, expected)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


@pytest.mark.parametrize("first", ["none", "ngram", "causal_lm", "ngram+causal_lm", "limited"])
def test_a_draft_model_finds_its_own_keys_and_values(make_cached, first: str) -> None:
    """A draft model that is the verifier is always right, unless blocks lack its K/V.

    They do where another drafter, or none, came first; and it lags behind where lookup guesses.
    """
    engine = make_cached("llama", causal_lm="llama")
    # A text that lookup is good at, so that the model is asked now and then.
    prompt = [*prompt_of(9), *prompt_of(6), *prompt_of(9), *prompt_of(6), *prompt_of(7)]
    options = {"drafter": "causal_lm" if first == "limited" else first}
    if first == "limited":
        options["num_speculative_tokens"] = 0
    (before,) = send(engine, (prompt, GREEDY), **options)
    turns = [before.token_ids[:40], [*before.token_ids, *prompt_of(3, seed=9)]]
    for turn in turns:
        (one,) = send(engine, (turn, GREEDY), drafter="causal_lm", num_speculative_tokens=5)
        assert one.num_accepted_tokens == one.num_draft_tokens > 0
        if turn is turns[0]:  # only a sequence that it drafted for has left something
            assert (one.num_cached_tokens > 0) == ("causal_lm" in first)
    (again,) = send(engine, (turns[1], GREEDY), drafter="causal_lm")
    assert again.num_cached_tokens == full_blocks(again.num_prompt_tokens)
    assert again.num_accepted_tokens == again.num_draft_tokens > 0


def test_a_draft_model_computes_only_what_it_lacks(make_cached) -> None:
    """Of a prompt that is cached, the last tokens, as the verifier does."""
    engine = make_cached("llama", causal_lm="llama")
    counts: list[int] = []
    embed = engine.drafters["causal_lm"]._model.get_input_embeddings()  # type: ignore[attr-defined]
    embed.register_forward_hook(lambda module, args, output: counts.append(args[0].numel()))
    for num_computed in (len(SHARED), len(SHARED) - full_blocks(len(SHARED))):
        counts.clear()
        send(engine, (SHARED, GREEDY), drafter="causal_lm")
        assert counts[0] == num_computed


def test_a_lagging_draft_model_offers_only_what_it_has(
    make_cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It isn't asked for a whole answer, whose blocks then lack its K/V."""
    engine = make_cached("llama", causal_lm="llama")
    drafter = engine.drafters["causal_lm"]
    with monkeypatch.context() as patch:
        patch.setattr(drafter, "propose", lambda requests, _: [Draft([])] * len(requests))
        (first,) = send(engine, (SHARED, GREEDY), drafter="causal_lm")
    turn = [*first.token_ids, *prompt_of(3, seed=9)]
    (second,) = send(engine, (turn, GREEDY), drafter="causal_lm")
    assert second.num_cached_tokens == len(SHARED) // BLOCK_SIZE * BLOCK_SIZE
    assert second.num_accepted_tokens == second.num_draft_tokens > 0


@pytest.mark.parametrize("drafter", ["none", "ngram", "mtp", "causal_lm"])
def test_preempted_sequences_write_the_same_and_find_their_blocks(
    engines: Engines, make_cached, drafter: str
) -> None:
    """A pool that holds two of six at full length; no two begin alike."""
    verifier = "gemma-4-31B"
    engine = make_cached(
        verifier, mtp=True, causal_lm="llama", max_model_len=60, kv_cache_tokens=108
    )
    requests = [(prompt_of(20 + i, seed=i), (GREEDY, SAMPLED)[i % 2]) for i in range(6)]
    sequences = send(engine, *requests, drafter=drafter)
    assert engine.load.num_preemptions > 0
    assert [s.output_ids for s in sequences] == plain(engines(verifier), requests)
    assert any(s.num_cached_tokens > 0 for s in sequences)
    assert engine.stats.num_prefix_cache_hits == 0


def test_what_was_looked_for_and_found_is_counted(make_cached) -> None:
    """Once for each request, whatever happens to it later."""
    engine = make_cached("llama")
    prompts = [prompt for prompt, _ in REQUESTS[:2]]
    for prompt in prompts:
        send(engine, (prompt, GREEDY))
    assert engine.stats.num_prefix_cache_queries == sum(map(len, prompts))
    assert engine.stats.num_prefix_cache_hits == len(SHARED) // BLOCK_SIZE * BLOCK_SIZE
    (output,) = engine.generate([prompts[0]], GREEDY)
    assert output.num_cached_tokens == full_blocks(len(prompts[0]))


def test_shared_blocks_are_used_once_and_all_are_free_in_the_end(make_cached) -> None:
    engine = make_cached("llama")
    send(engine, (SHARED, GREEDY))
    assert engine.load.num_blocks_used == 0
    sequences = [engine.make_sequence(SHARED, GREEDY) for _ in range(3)]
    for one in sequences:
        engine.add(one)
    engine.step()
    tables = [blocks_of(one) for one in sequences]
    num_shared = full_blocks(len(SHARED)) // BLOCK_SIZE
    assert tables[0][:num_shared] == tables[1][:num_shared] == tables[2][:num_shared]
    assert engine.load.num_blocks_used == sum(map(len, tables)) - 2 * num_shared
    engine.cancel(sequences[0])
    engine.step()
    engine.check_integrity()
    run(engine, [])
    assert engine.load.num_blocks_used == 0


def test_what_a_cancelled_request_computed_is_found(engines: Engines, make_cached) -> None:
    """Two of three chunks of a prompt."""
    engine = make_cached("llama", max_num_batched_tokens=16)
    one = engine.make_sequence(SHARED, GREEDY)
    engine.add(one)
    engine.step()
    engine.step()
    engine.cancel(one)
    (other,) = send(engine, (SHARED, GREEDY))
    assert other.num_cached_tokens == 32
    assert [other.output_ids] == plain(engines("llama"), [(SHARED, GREEDY)])


def test_a_salt_keeps_requests_apart(make_cached) -> None:
    engine = make_cached("llama")
    found = [
        send(engine, (SHARED, GREEDY), cache_salt=salt)[0].num_cached_tokens
        for salt in ("", "one", "two", "one", "")
    ]
    assert found == [0, 0, 0, full_blocks(len(SHARED)), full_blocks(len(SHARED))]
    with pytest.raises(InvalidRequestError, match="cache_salt must be a string, got 7"):
        engine.make_sequence(SHARED, GREEDY, cache_salt=7)


def test_the_cache_can_be_switched_off(make_cached) -> None:
    engine = make_cached("llama", enable_prefix_caching=False)
    for _ in range(2):
        (one,) = send(engine, (SHARED, GREEDY))
        assert one.num_cached_tokens == 0
    assert engine.stats.num_prefix_cache_queries == engine.stats.num_prefix_cache_hits == 0


def test_it_is_on_unless_switched_off(tmp_path: Path) -> None:
    engine = Engine(config_of(save_verifier("llama", tmp_path)))
    for found in (0, full_blocks(len(SHARED))):
        (one,) = send(engine, (SHARED, GREEDY))
        assert one.num_cached_tokens == found


def test_keys_and_values_that_are_not_numbers_are_not_shared(tmp_path: Path) -> None:
    """A pass goes wrong once: the next request with the same prompt is computed anew."""
    engine = Engine(config_of(save_verifier("llama", tmp_path), max_num_batched_tokens=16))
    embed = engine.verifier.model.get_input_embeddings()
    prompt = prompt_of(30)
    fail = embed.register_forward_hook(lambda module, args, output: output * float("nan"))
    bad = engine.make_sequence(prompt, GREEDY)
    engine.add(bad)
    engine.step()
    fail.remove()
    run(engine, [])
    assert "not numbers" in str(bad.error)
    (good,) = send(engine, (prompt, GREEDY))
    assert good.num_cached_tokens == 0
    assert len(good.output_ids) == NUM_TOKENS
