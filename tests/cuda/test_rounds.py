"""Rounds on the device: what a graph can hold, how often the host waits, and sizes of graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_wing import FakeGraph, HostTools, QuickWing, choose_as_a_cpu, cuda_wing
from doubles import finish, plain, prompt_of, tokens_of
from tandem import ConfigError, Engine, Guide, SamplingParams
from tandem.drafters.mtp import MTPDrafter
from tandem.rounds.device import DeviceRound
from tandem.rounds.staging import Staging
from tandem_bench.launches import Launches
from tiny_engines import Engines

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="graphs hold it there or fail")
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=1, ignore_eos=True)
GREEDY = replace(SAMPLED, temperature=0.0, top_p=1.0)
ADJUSTED = replace(SAMPLED, repetition_penalty=1.2, logit_bias={5: 1.0}, min_tokens=4)


class NotedTools(HostTools):
    """Kernels that are noted and not run: in the interpreter they'd be torch's operations."""

    recorded: Launches | None = None

    def __init__(self, device: torch.device) -> None:
        super().__init__(self._attend, self._choose, device)  # type: ignore[arg-type]

    def _attend(self, query: Tensor, *rest: Any, causal: bool) -> Tensor:
        if self.recorded is not None:
            self.recorded.note("attend_parts", query, *rest[:4])
            self.recorded.note("join_parts", query)
        return query.transpose(1, 2).contiguous()

    def _choose(self, logits: Tensor, seeds: Tensor, *_: Any, token_ids: Any = None) -> Tensor:
        if self.recorded is not None:
            for kernel in ("find_maxima", "find_bounds", "find_winners", "join_winners"):
                self.recorded.note(kernel, logits)
        return torch.zeros_like(seeds)


class NotedWing(QuickWing):
    def round_tools(self, dtype: torch.dtype) -> NotedTools:
        return NotedTools(self._device)


@contextmanager
def recording(engine: Engine) -> Iterator[Launches]:
    assert isinstance(engine.round, DeviceRound)
    tools = engine.round._tools
    assert isinstance(tools, NotedTools)
    with Launches() as recorded:
        tools.recorded = recorded
        yield recorded
    tools.recorded = None


def programs_of(engine: Engine) -> list[Callable[[], object]]:
    """A round of the batch that was sent last, program by program."""
    round_ = engine.round
    assert isinstance(round_, DeviceRound)
    programs, size = round_.programs, round_.size
    return [
        lambda: programs.draft(0, 3, 4),
        lambda: programs.accept(size, programs.verify(size), adjusts=False),
    ]


def start(engine: Engine, num_sequences: int, params: SamplingParams, seed: int = 0) -> None:
    for number in range(num_sequences):
        prompt = prompt_of(5 + 3 * number, seed)
        engine.add(
            engine.make_sequence(
                prompt, replace(params, seed=number), drafter="mtp", num_speculative_tokens=4
            )
        )


@pytest.fixture(scope="module")
def _noted(cuda_engines: Engines) -> Engine:
    with cuda_wing(NotedWing):
        return cuda_engines.make("gemma-4-E2B", mtp=True)


@pytest.fixture
def noted(_noted: Engine) -> Iterator[Engine]:
    """An engine whose kernels are only noted."""
    with cuda_wing(NotedWing):
        yield _noted


@pytest.mark.parametrize(
    ("params", "num_sent"), [(SAMPLED, 1), (ADJUSTED, 2)], ids=["sampled", "adjusted"]
)
def test_a_step_reads_once_and_nothing_in_its_programs(
    noted: Engine, monkeypatch: pytest.MonkeyPatch, params: SamplingParams, num_sent: int
) -> None:
    """Prompts, drafts, greedy and sampled rows: one copy there, one back, nothing else is read.

    How logits are changed takes one copy more.
    """
    copies: Counter[str] = Counter()
    for name in ("send", "receive"):
        method = getattr(Staging, name)

        def counted(staging: Staging, name: str = name, method: Any = method) -> None:
            copies[name] += 1
            method(staging)

        monkeypatch.setattr(Staging, name, counted)
    start(noted, 2, params)
    start(noted, 2, GREEDY)
    steps = 0
    with recording(noted) as recorded:
        while noted.has_work:
            copies.clear()
            noted.step()
            steps += 1
            assert copies["receive"] == 1
            # Whoever ends last may be a greedy one.
            assert copies["send"] == num_sent or noted.scheduler.running == []
    assert steps > 2
    assert recorded.refused == []
    assert recorded.counts["find_maxima"] > 0


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_programs_launch_the_same_from_the_same_places(
    noted: Engine, params: SamplingParams
) -> None:
    """For other sequences, lengths and drafts: no shape changes, and no buffer moves."""
    found = []
    for seed in (1, 2):
        start(noted, 3, params, seed)
        for _ in range(2 * seed):
            noted.step()
        batch = noted.schedule()
        noted.draft(batch)
        each = []
        for program in programs_of(noted):
            with recording(noted) as recorded:
                program()
            assert recorded.refused == []
            each.append((recorded.launches, recorded.outside))
        found.append(each)
        for sequence in list(noted.scheduler.running):
            noted.cancel(sequence)
        finish(noted)
    first, second = found
    sizes = [len(launches) for launches, _ in first]
    assert min(sizes) > 20
    for one, other in zip(first, second, strict=True):
        assert one == other


class CountedGraphs(HostTools):
    """Counts replays of graphs, and what runs without one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.graphs: list[FakeGraph] = []

    def graph(self, run: Callable[[], Any]) -> FakeGraph:
        self.graphs.append(FakeGraph(run))
        return self.graphs[-1]

    @property
    def num_replays(self) -> int:
        return sum(graph.num_replays for graph in self.graphs)


class GraphWing(QuickWing):
    def round_tools(self, dtype: torch.dtype) -> CountedGraphs:
        return CountedGraphs(self.attention_kernel(dtype), choose_as_a_cpu, self._device)


def test_steps_are_a_few_graphs(engines: Engines) -> None:
    """Three for a step with an assistant, and two without; the tokens are those of no graphs.

    Penalties have graphs too.
    """
    settings = {"max_num_seqs": 3, "max_num_batched_tokens": 40}
    asked = [SAMPLED, SAMPLED, SAMPLED, ADJUSTED]
    requests = [(prompt_of(9 + 17 * n), replace(each, seed=n)) for n, each in enumerate(asked)]
    expected = plain(engines("gemma-4-31B", mtp=True), requests)
    with cuda_wing(GraphWing):
        engine = engines.make("gemma-4-31B", mtp=True, enforce_eager=False, **settings)
        assert isinstance(engine.round, DeviceRound)
        tools = engine.round._tools
        assert isinstance(tools, CountedGraphs)
        for drafter, most in (("none", 2), ("mtp", 3), ("ngram", 2), ("ngram+mtp", 3)):
            sequences = [engine.make_sequence(*each, drafter=drafter) for each in requests]
            for sequence in sequences:
                engine.add(sequence)
            while engine.has_work:
                decodes = not engine.scheduler.waiting and all(
                    s.is_decoding for s in engine.scheduler.running
                )
                before = tools.num_replays
                engine.step()
                if decodes:
                    assert 2 <= tools.num_replays - before <= most
            assert [s.output_ids for s in sequences] == expected, drafter


def test_no_memory_for_graphs_says_what_to_change(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory while graphs are made is an error of the configuration."""

    def graph(tools: HostTools, run: Callable[[], Any]) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(HostTools, "graph", graph)
    with cuda_wing(QuickWing), pytest.raises(ConfigError, match="lower kv_cache_tokens"):
        engines.make("llama", enforce_eager=False)


PLAIN = {"max_tokens": 10, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0.0, **PLAIN),
    SamplingParams(temperature=0.8, seed=1, top_k=30, top_p=0.9, **PLAIN),
    SamplingParams(temperature=1.2, seed=2, min_p=0.05, logprobs=2, **PLAIN),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, **PLAIN),
    SamplingParams(temperature=0.7, seed=3, presence_penalty=1.5, logit_bias={7: 4.0}, **PLAIN),
    SamplingParams(temperature=0.7, seed=4, frequency_penalty=0.8, min_tokens=6, max_tokens=10),
    # Half of all tokens, so that the device by itself would choose others.
    SamplingParams(temperature=0.9, seed=5, bad_words=tuple("aeiorstnl"), **PLAIN),
]


def test_both_wings_write_the_same(engines: Engines) -> None:
    """Alone and together, what the host samples and what the device does, with prefix hits.

    Guesses are the same too: else speculation would only be slower.
    """
    settings = {"mtp": True, "enable_prefix_caching": True, "max_num_batched_tokens": 48}
    requests = [(prompt_of(41 + number), each) for number, each in enumerate(PARAMS)]
    other = engines.make("gemma-4-31B", **settings)
    with cuda_wing(QuickWing):
        engine = engines.make("gemma-4-31B", **settings)
    for drafter in ("none", "mtp", "ngram+mtp"):
        for batch in (*([each] for each in requests), requests):
            expected = tokens_of(other, batch, drafter=drafter)
            with cuda_wing(QuickWing):
                assert tokens_of(engine, batch, drafter=drafter) == expected
    assert engine.drafter_stats == other.drafter_stats
    assert engine.drafter_stats["mtp"].num_accepted_tokens > 0
    assert engine.stats.num_prefix_cache_hits > 0


def test_states_are_those_behind_what_the_host_accepts(engines: Engines) -> None:
    """The device alone would reject what a grammar forces, and go on from another state."""
    params = SamplingParams(temperature=0.0, guide=Guide("regex", "a{30}b"), max_tokens=40)
    other = engines("gemma-4-31B", mtp=True)
    with cuda_wing(QuickWing):
        engine = engines.make("gemma-4-31B", mtp=True)
    assert isinstance(engine.round, DeviceRound)
    drafter = other.drafters["mtp"]
    assert isinstance(drafter, MTPDrafter)
    mine, theirs = (e.make_sequence([5, 6, 7], params, drafter="mtp") for e in (engine, other))
    engine.add(mine)
    other.add(theirs)
    num_forced = 0
    while other.has_work:
        other.step()
        with cuda_wing(QuickWing):
            engine.step()
        assert mine.token_ids == theirs.token_ids
        num_forced = max(num_forced, mine.num_accepted_tokens)
        if not mine.is_finished:
            [slot] = engine.round._slots.assign([mine])
            state, expected = engine.round._state.hidden[slot], drafter._hidden[theirs.id]
            torch.testing.assert_close(state, expected)
    assert num_forced > 0
