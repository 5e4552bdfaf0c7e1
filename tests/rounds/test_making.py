"""What a GPU's memory is for: weights, graphs, the largest pass, and the KV cache with the rest."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cuda_wing
from tandem import Engine, EngineConfig, SamplingParams
from tandem.cache.kv_cache import KVCache
from tandem.cache.room import CacheRoom
from tandem.drafters.mtp import Gemma4Drafter
from tandem.errors import ConfigError
from tandem.models.verifier import Verifier
from tandem.rounds import making
from tandem.rounds.device import DeviceRound
from tandem.rounds.programs import Programs
from tiny_engines import DEVICE, Engines

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the card counts its memory itself")
MIB = 2**20
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
WEIGHTS, ROW, GRAPH, OTHERS = 8 * MIB, 2**12, 2**14, MIB
SETTINGS: dict[str, Any] = {
    "kv_cache_tokens": None,
    "max_num_seqs": 2,
    "block_size": 4,
    "max_model_len": 60,
    "max_num_batched_tokens": 64,
    "enforce_eager": False,
}


class Card:
    """Counts what lives in its memory, as torch does what it reserves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total = 20 * MIB
        self.most_rows = 0
        self.caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self.graphs: weakref.WeakSet[cuda_wing.FakeGraph] = weakref.WeakSet()
        self.seen: list[dict[str, int]] = []
        # What one block more than the KV cache has would take, of every group that grows with it.
        self.blocks: list[int] = []
        num_tokens = CacheRoom.num_tokens
        allocate, run_verify = KVCache.allocate, Programs._run_verify
        make_graph = cuda_wing.FakeGraph.__init__

        def noted_allocate(cache: KVCache, *arguments: Any) -> None:
            allocate(cache, *arguments)
            self.caches.add(cache)
            self.check()

        def noted_graph(graph: cuda_wing.FakeGraph, *arguments: Any) -> None:
            make_graph(graph, *arguments)
            self.graphs.add(graph)
            self.check()

        def noted_pass(programs: Programs, size: Any, *scored: Any) -> Any:
            self.most_rows = max(self.most_rows, size.num_rows)
            self.check()
            return run_verify(programs, size, *scored)

        def noted_room(room: CacheRoom, num_bytes: int) -> int:
            found = num_tokens(room, num_bytes)
            more = found + SETTINGS["block_size"]
            self.blocks.append(room.num_bytes(more) - room.num_bytes(found))
            return found

        monkeypatch.setattr(CacheRoom, "num_tokens", noted_room)
        monkeypatch.setattr(KVCache, "allocate", noted_allocate)
        monkeypatch.setattr(cuda_wing.FakeGraph, "__init__", noted_graph)
        monkeypatch.setattr(Programs, "_run_verify", noted_pass)
        monkeypatch.setattr(torch.cuda, "memory_reserved", self.reserved)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.info)

    def reserved(self, _: object = None) -> int:
        cached = sum(cache.num_bytes for cache in self.caches)
        return WEIGHTS + cached + len(self.graphs) * GRAPH + self.most_rows * ROW

    def check(self) -> None:
        if self.reserved() + OTHERS > self.total:
            raise torch.OutOfMemoryError("nothing is left")

    def info(self, _: object = None) -> tuple[int, int]:
        self.seen.append({"graphs": len(self.graphs), "rows": self.most_rows})
        return self.total - self.reserved() - OTHERS, self.total


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    with cuda_wing.cuda_wing(cuda_wing.QuickWing):
        yield Card(monkeypatch)


@pytest.mark.parametrize(
    ("verifier", "drafters"),
    [("gemma-4-31B", {"mtp": True, "causal_lm": "gemma-3"}), ("llama", {})],
)
def test_the_cache_gets_what_everything_else_leaves(
    engines: Engines, card: Card, verifier: str, drafters: dict[str, Any]
) -> None:
    """Measured behind the drafters, the graphs and the largest pass; with graphs made anew."""
    expected = engines(verifier, **drafters).generate([[3] * 9], GREEDY)
    engine = engines.make(verifier, **drafters, **SETTINGS)
    (seen,) = card.seen
    assert seen["rows"] == 64
    assert seen["graphs"] == len(card.graphs) > 20
    assert isinstance(engine.round, DeviceRound)
    # A block more of tokens would not fit; the slot of nobody is beyond what was asked for.
    (block,) = card.blocks
    assert -block < card.reserved() + OTHERS - int(0.9 * card.total) < block
    found = engine.generate([[3] * 9], GREEDY)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    if (mtp := engine.drafters.get("mtp")) is not None:
        assert isinstance(mtp, Gemma4Drafter)
        pool = {cache.layer(n)[0].data_ptr() for cache in card.caches for n in cache.layers}
        assert {keys.data_ptr() for keys, _ in mtp.shared_kv_states.values()} <= pool
    for drafter in engine.drafters:
        engine.generate([[5] * 9] * 4, GREEDY, drafter=drafter)
    engine.check_integrity()


def test_a_card_that_is_too_small_says_what_to_change(engines: Engines, card: Card) -> None:
    card.total = WEIGHTS + OTHERS + 16 * ROW
    with pytest.raises(ConfigError, match=r"CUDA graphs find no memory: lower .*max_num_seqs"):
        engines.make("llama", **SETTINGS)
    card.total = WEIGHTS + OTHERS + 32 * ROW
    eager = SETTINGS | {"enforce_eager": True}
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens, 64, .* than is free: lower it"):
        engines.make("llama", **eager)
    card.total = WEIGHTS + 2 * MIB
    with pytest.raises(ConfigError, match=r"holds \d+ tokens, .* raise gpu_memory_utilization"):
        engines.make("llama", **eager, gpu_memory_utilization=0.8)


def test_a_cache_of_given_size_is_made_once(engines: Engines, card: Card) -> None:
    engine = engines.make("llama", **SETTINGS | {"kv_cache_tokens": 240})
    assert card.seen == []
    assert engine.verifier.cache.groups[0].num_blocks == 60


def test_the_first_round_is_gone_before_the_cache_grows(
    engines: Engines, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs' memory is the next one's."""
    made: list[weakref.ref[Any]] = []
    make = making._make

    def noted(verifier: Verifier, drafters: Any, loaded: Any, config: EngineConfig) -> Any:
        assert all(each() is None for each in made)
        round_ = make(verifier, drafters, loaded, config)
        made.append(weakref.ref(round_))
        return round_

    monkeypatch.setattr(making, "_make", noted)
    engine: Engine = engines.make("llama", **SETTINGS)
    assert [each() for each in made] == [None, engine.round]
