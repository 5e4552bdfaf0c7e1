"""Layers with a window keep only what a query can still reach, and nobody sees it in a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from block_tables import blocks_of
from doubles import plain, prompt_of, send
from tandem import Engine, SamplingParams, Sequence
from tandem.cache.kv_cache import KVCache
from tandem.cache.layer_groups import LayerGroup, group_of, plan_groups, windows_of
from tandem.drafters.causal_lm import CausalLMDrafter
from tiny_engines import Engines
from tiny_models import VERIFIERS, WINDOW

BLOCK_SIZE = 4  # of the tiny engines
NUM_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.2, seed=3)
REQUESTS = [(prompt_of(n, seed=n), p) for n in (3, 30, 61) for p in (GREEDY, SAMPLED)]
WITH_WINDOWS = [name for name in VERIFIERS if name.startswith("gemma")]
DRAFTERS = ["ngram", "mtp", "causal_lm", "ngram+mtp", "ngram+causal_lm"]
# What a sequence that decodes may hold in a window group: the window and where it begins and ends
# inside a block, what lies behind the last full block, and drafts.
MOST = -(-(WINDOW + 1) // BLOCK_SIZE) + 2


def poison(engine: Engine) -> None:
    """Fills blocks that nobody may read with NaN: those given out, and those free without a key."""
    drafters = [d for d in engine.drafters.values() if isinstance(d, CausalLMDrafter)]
    caches = [engine.verifier.cache, *(drafter._cache for drafter in drafters)]
    for number, blocks in enumerate(engine.scheduler.pool.blocks):

        def fill(block: int, number: int = number) -> None:
            slots = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            for pool in _pools(caches, number):
                pool[slots] = torch.nan

        def extend(
            table: list[int], count: int, fill: Any = fill, original: Any = blocks.extend
        ) -> None:
            original(table, count)
            for block in table[len(table) - count :]:
                fill(block)

        def free(
            block: int,
            *,
            protected: bool = True,
            fill: Any = fill,
            blocks: Any = blocks,
            original: Any = blocks.free,
        ) -> None:
            original(block, protected=protected)
            if blocks._num_users[block] == 0 and block not in blocks._keys:
                fill(block)

        blocks.extend, blocks.free = extend, free  # type: ignore[method-assign]


def _pools(caches: list[KVCache], group: int) -> Iterator[torch.Tensor]:
    for cache in caches:
        for layer in cache.layers:
            if cache.group_of_layer(layer) == group:
                yield from cache.layer(layer)


@pytest.fixture
def make(engines: Engines) -> Iterator[Callable[..., Engine]]:
    """Makes tiny engines whose free blocks are poisoned; in the end all blocks must be free."""
    made: list[Engine] = []

    def make(name: str, **settings: Any) -> Engine:
        engine = engines.make(name, **{"max_num_batched_tokens": 16, **settings})
        poison(engine)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        assert not engine.has_work
        engine.check_integrity()
        assert engine.load.num_blocks_used == 0


@pytest.mark.parametrize("verifier", WITH_WINDOWS)
def test_a_window_group_never_holds_more_than_window_and_chunk(
    make, engines: Engines, verifier: str
) -> None:
    """And what it has given back is no number any more, which no token shows."""
    engine = make(verifier)
    assert engine.verifier.cache.windows == [None, WINDOW]
    sequences = [engine.make_sequence(*request) for request in REQUESTS]
    for one in sequences:
        engine.add(one)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        for one in engine.scheduler.running:
            chunk = 0 if one.is_decoding else engine.config.max_num_batched_tokens // BLOCK_SIZE
            assert len(blocks_of(one, 1)) <= MOST + chunk
            assert len(blocks_of(one, 0)) >= -(-one.num_computed // BLOCK_SIZE)
    assert [s.output_ids for s in sequences] == plain(engines(verifier), REQUESTS)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("caching", [False, True], ids=["cold", "hits"])
def test_every_drafter_writes_the_same(make, engines: Engines, drafter: str, caching: bool) -> None:
    engine = make("gemma-4-31B", mtp=True, causal_lm="gemma-3", enable_prefix_caching=caching)
    expected = plain(engines("gemma-4-31B"), REQUESTS)
    for _ in range(2):
        sequences = send(engine, *REQUESTS, drafter=drafter)
        assert [s.output_ids for s in sequences] == expected
        assert sum(s.num_draft_tokens for s in sequences) > 0


def test_a_drafter_that_is_not_asked_catches_up(
    make, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads what lies behind its own last token, which would be kept until it is asked."""
    engine = make("gemma-4-31B", causal_lm="gemma-3")
    params = replace(GREEDY, max_tokens=180)
    monkeypatch.setattr(engine.lookahead, "plan", _plan_nothing)
    one = engine.make_sequence(prompt_of(5), params, drafter="causal_lm")
    engine.add(one)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(blocks_of(one, 1)))
    assert most <= MOST + 64 // BLOCK_SIZE + 1
    assert [one.output_ids] == plain(engines("gemma-4-31B"), [(prompt_of(5), params)])


def _plan_nothing(batch: list[Any]) -> None:
    for scheduled in batch:
        scheduled.num_draft_tokens = 0


@pytest.mark.parametrize("length", range(24, 34))
@pytest.mark.parametrize("shared", range(8, 25, 3))
def test_hits_in_all_alignments(make_shared, length: int, shared: int) -> None:
    """Of window, block and hit: a prompt that shares so many tokens with one of this length."""
    engine, plain_engine = make_shared
    first = prompt_of(length, seed=length * 100 + shared)
    second = [*first[:shared], *prompt_of(9, seed=7)]
    params = replace(GREEDY, max_tokens=6)
    send(engine, (first, params))
    found = [send(engine, (prompt, params))[0] for prompt in (second, first)]
    assert [s.output_ids for s in found] == plain(plain_engine, [(second, params), (first, params)])
    assert found[0].num_cached_tokens == shared // BLOCK_SIZE * BLOCK_SIZE
    assert found[1].num_cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.fixture(scope="module")
def make_shared(engines: Engines) -> tuple[Engine, Engine]:
    """One with hits and poison, and one without."""
    engine = engines.make("gemma-3", enable_prefix_caching=True, max_num_batched_tokens=16)
    poison(engine)
    return engine, engines("gemma-3")


def test_a_conversation_hits_at_each_turns_end(make) -> None:
    engine = make("gemma-3", enable_prefix_caching=True)
    params = replace(GREEDY, max_tokens=11)
    token_ids, num_computed = prompt_of(20), 0
    for turn in range(12):
        (one,) = send(engine, (token_ids, params))
        assert one.num_cached_tokens == num_computed // BLOCK_SIZE * BLOCK_SIZE
        num_computed = one.num_tokens - 1  # the last token was never read
        token_ids = [*one.token_ids, *prompt_of(7, seed=turn)]


def test_a_prefix_whose_window_is_gone_is_hit_where_it_is_whole(make) -> None:
    """The full group has all of it; of the window group only a beginning and the end are left."""
    engine = make("gemma-3", enable_prefix_caching=True)
    prompt = prompt_of(50)
    (one,) = send(engine, (prompt, replace(GREEDY, max_tokens=1)))
    blocks = engine.scheduler.pool.blocks[1]
    for index in (4, 5, 6, 7, 11):
        blocks.withdraw(one.prefix_keys[index + 1])
    # Tokens 32 to 44 are there, and 36 to 44 are what is read from 44 on, two more by an assistant.
    (again,) = send(engine, (prompt, replace(GREEDY, max_tokens=1)))
    assert again.num_cached_tokens == 44
    for index in range(4, 12):
        blocks.withdraw(one.prefix_keys[index + 1])
    (again,) = send(engine, (prompt, replace(GREEDY, max_tokens=1)))
    assert again.num_cached_tokens == 16
    assert again.output_ids == one.output_ids


@pytest.mark.parametrize("drafter", ["none", "mtp", "causal_lm"])
def test_preemption_inside_the_window(make, engines: Engines, drafter: str) -> None:
    """Six sequences where two find room."""
    few = {"max_model_len": 104, "kv_cache_tokens": 2 * 104, "enable_prefix_caching": True}
    engine = make("gemma-4-31B", mtp=True, causal_lm="gemma-3", **few)
    sequences = send(engine, *REQUESTS, drafter=drafter)
    assert engine.load.num_preemptions > 0
    assert [s.output_ids for s in sequences] == plain(engines("gemma-4-31B"), REQUESTS)


def test_a_window_group_that_runs_out_preempts_too(
    make, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it has blocks for all that may run."""
    expected = plain(engines("gemma-3"), REQUESTS)
    groups = [LayerGroup(None, 2048), LayerGroup(WINDOW, 3 * MOST)]
    monkeypatch.setattr("tandem.cache.room.plan_groups", lambda *_: groups)
    engine = make("gemma-3")
    sequences = send(engine, *REQUESTS)
    assert engine.load.num_preemptions > 0
    assert [s.output_ids for s in sequences] == expected


@pytest.mark.parametrize("verifier", ["llama", "qwen-3"])
def test_without_windows_there_is_one_group(make, verifier: str) -> None:
    engine = make(verifier)
    assert engine.verifier.cache.groups == [LayerGroup(None, 8192 // BLOCK_SIZE)]
    (one,) = send(engine, (prompt_of(30), GREEDY))
    assert isinstance(one, Sequence)


def test_a_window_that_no_sequence_outgrows_is_none(make) -> None:
    engine = make("gemma-3", max_model_len=WINDOW, kv_cache_tokens=64)
    assert engine.verifier.cache.windows == [None]


def test_groups_by_their_windows() -> None:
    assert windows_of([512, None, 1024, 512], 4096) == [None, 512, 1024]
    assert windows_of([512, 4096, 1024], 4096) == [None, 512, 1024]
    assert windows_of([512], 4096) == [512]
    assert [group_of([None, 512], window) for window in (512, None, 8192)] == [1, 0, 0]
    with pytest.raises(ValueError, match="None"):
        group_of([512, 1024], 256)


@pytest.mark.parametrize(
    ("num_tokens", "blocks"), [(131072, (8192, 32 * 36 + 32)), (1024, (64, 64))]
)
def test_a_window_group_has_blocks_for_all_that_run_and_for_conversations_at_rest(
    num_tokens: int, blocks: tuple[int, int]
) -> None:
    """16 sequences of 512 tokens and more, as many again, and a pass; or what all tokens fill."""
    groups = plan_groups([None, 512], num_tokens, 16, 8192, 16, 512)
    assert groups == [LayerGroup(None, blocks[0]), LayerGroup(512, blocks[1])]
