"""Every token reaches its request once and in order, whoever must wait."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence as Items

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tandem_triton.outbox
from tandem import Delta, FinishReason, SamplingParams, Sequence
from tandem_triton.outbox import Outbox, Receiver

_COST = 0.0003  # seconds, of a response


class _Clock:
    """Stands in for the module `time`: time passes when a response is sent."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class _Request:
    """Notes its responses, each with the tokens of one sequence."""

    def __init__(self, clock: _Clock, *, streams: bool = True) -> None:
        self.streams = streams
        self.responses: list[list[int]] = []
        self._clock = clock

    def has_begun(self, sequence: Sequence) -> bool:
        return bool(self.responses)

    def deliver(self, news: Items[tuple[float, Delta]]) -> None:
        times = [time for time, _ in news]
        assert times == sorted(times)
        self.responses.append([token for _, delta in news for token in delta.token_ids])
        self._clock.now += _COST


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(tandem_triton.outbox, "time", clock)
    return clock


def _sequence(index: int = 0) -> Sequence:
    return Sequence(index, [1, 2], 2, SamplingParams(), 0, "none", 0)


def _step(outbox: Outbox, request: Receiver, sequence: Sequence, *, ends: bool = False) -> None:
    """A step that gives the sequence its next number."""
    token = sequence.num_output_tokens
    sequence.token_ids.append(token)
    reason = FinishReason.LENGTH if ends else None
    outbox.put(request, Delta(sequence, [token], finish_reason=reason))


def test_first_tokens_and_ends_do_not_wait(clock: _Clock) -> None:
    outbox = Outbox()
    request, sequence = _Request(clock), _sequence()
    _step(outbox, request, sequence)
    outbox.send_due(0.0)
    assert request.responses == [[0]]
    _step(outbox, request, sequence)
    outbox.send_due(0.0)
    assert request.responses == [[0]]
    _step(outbox, request, sequence, ends=True)
    outbox.send_due(0.0)
    assert request.responses == [[0], [1, 2]]


def test_a_beginning_goes_before_an_end(clock: _Clock) -> None:
    outbox = Outbox()
    order: list[str] = []

    class Named(_Request):
        def __init__(self, name: str) -> None:
            super().__init__(clock)
            self.name = name

        def deliver(self, news: Items[tuple[float, Delta]]) -> None:
            super().deliver(news)
            order.append(self.name)

    old, new = Named("old"), Named("new")
    _step(outbox, old, sequence := _sequence(0))
    outbox.send_due(0.0)
    _step(outbox, old, sequence, ends=True)
    _step(outbox, new, _sequence(1))
    outbox.send_due(0.0)
    assert order == ["old", "new", "old"]


def test_while_a_client_may_answer_an_end_others_get_their_tokens_early(clock: _Clock) -> None:
    """For a few milliseconds, which are made up for afterwards."""
    outbox = Outbox()
    running = [(_Request(clock), _sequence(i)) for i in range(40)]
    for ends in (False, True):
        for index, (request, sequence) in enumerate(running):
            _step(outbox, request, sequence, ends=ends and index == 39)
        outbox.send_due(0.0)
    early = sum(len(request.responses) == 2 for request, _ in running[:39])
    assert early == pytest.approx(tandem_triton.outbox._ANSWER_SECONDS / _COST, abs=1)
    assert len(running[39][0].responses) == 2
    clock.now += 0.02
    for request, sequence in running[:39]:
        _step(outbox, request, sequence)
    outbox.send_due(0.02)
    assert all(len(request.responses) <= 2 for request, _ in running)


def test_responses_take_a_share_of_the_time(clock: _Clock) -> None:
    """Twenty sequences, whose responses would take ten times as much."""
    outbox = Outbox()
    running = [(_Request(clock), _sequence(i)) for i in range(20)]
    step_seconds, num_steps = 0.02, 200
    start = clock.now
    for _ in range(num_steps):
        clock.now += step_seconds
        for request, sequence in running:
            _step(outbox, request, sequence)
        outbox.send_due(step_seconds)
    sending = clock.now - start - num_steps * step_seconds
    first = len(running) * _COST
    share = tandem_triton.outbox._SHARE
    assert sending <= first + num_steps * share * step_seconds + _COST
    # In turns, so nobody waits longer than the others.
    counts = [len(request.responses) for request, _ in running]
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 1


@pytest.mark.parametrize(("num_streams", "most"), [(1, 0.01), (4, 0.04), (20, 0.2), (50, 0.2)])
def test_nobody_waits_for_long(clock: _Clock, num_streams: int, most: float) -> None:
    """Few wait for less: what their responses take is little, however often they come."""
    outbox = Outbox()
    running = [(_Request(clock), _sequence(i)) for i in range(num_streams)]
    for request, sequence in running:
        _step(outbox, request, sequence)
    outbox.send_due(0.0)
    for _ in range(15):
        clock.now += most / 10
        for request, sequence in running:
            _step(outbox, request, sequence)
        outbox.send_due(0.0)
    for request, _ in running:
        _, tokens = request.responses
        assert 8 <= len(tokens) <= 12


def test_without_stream_there_is_one_response(clock: _Clock) -> None:
    outbox = Outbox()
    request, sequence = _Request(clock, streams=False), _sequence()
    for ends in (False, False, True):
        clock.now += 2 * tandem_triton.outbox._MAX_WAIT_SECONDS
        _step(outbox, request, sequence, ends=ends)
        outbox.send_due(1.0)
    assert request.responses == [[0, 1, 2]]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.floats(0.0, 0.05)), max_size=80))
def test_nothing_is_lost_or_doubled(
    events: list[tuple[int, bool, float]],
) -> None:
    """Tokens of five sequences, sent as time allows, and some sequences end."""
    with pytest.MonkeyPatch.context() as patch:
        clock = _Clock()
        patch.setattr(tandem_triton.outbox, "time", clock)
        outbox = Outbox()
        running = [(_Request(clock, streams=i > 0), _sequence(i)) for i in range(5)]
        ended = set[int]()
        for index, ends, seconds in events:
            if index not in ended:
                _step(outbox, *running[index], ends=ends)
                ended |= {index} if ends else set()
            outbox.send_due(seconds)
            for i in ended:
                assert sum(map(len, running[i][0].responses)) == running[i][1].num_output_tokens
    for request, _ in running:
        tokens = [token for response in request.responses for token in response]
        assert tokens == list(range(len(tokens)))


def test_a_sender_of_its_own_falls_behind_without_losing_anything() -> None:
    """Responses that take longer than steps become larger instead of later."""
    outbox = Outbox()
    received = defaultdict[int, list[int]](list)
    num_responses = 0
    gate = threading.Event()

    class Slow:
        streams = True

        def has_begun(self, sequence: Sequence) -> bool:
            return bool(received[sequence.id])

        def deliver(self, news: Items[tuple[float, Delta]]) -> None:
            nonlocal num_responses
            gate.wait(10)
            num_responses += 1
            for _, delta in news:
                received[delta.sequence.id] += delta.token_ids

    sender = threading.Thread(target=outbox.run)
    sender.start()
    request = Slow()
    sequences = [_sequence(i) for i in range(3)]
    for number in range(50):
        for sequence in sequences:
            _step(outbox, request, sequence, ends=number == 49)
    gate.set()
    outbox.close()
    sender.join(10)
    assert not sender.is_alive()
    assert dict(received) == {i: list(range(50)) for i in range(3)}
    assert num_responses <= 6


def test_tokens_that_come_during_the_first_response_wait_in_one_line() -> None:
    """Some before the sequence counts as begun, some behind."""
    outbox = Outbox()
    entered, gate = threading.Event(), threading.Event()

    class Gated:
        streams = True

        def __init__(self) -> None:
            self.begun = False
            self.received: list[int] = []

        def has_begun(self, sequence: Sequence) -> bool:
            return self.begun

        def deliver(self, news: Items[tuple[float, Delta]]) -> None:
            entered.set()
            gate.wait(10)
            self.received += [token for _, delta in news for token in delta.token_ids]

    first, other = Gated(), Gated()
    sender = threading.Thread(target=outbox.run)
    sender.start()
    _step(outbox, first, sequence := _sequence())
    assert entered.wait(10)
    _step(outbox, first, sequence)
    first.begun = other.begun = True
    _step(outbox, first, sequence)
    _step(outbox, other, _sequence(1))
    gate.set()
    outbox.close()
    sender.join(10)
    assert first.received == [0, 1, 2]
    assert other.received == [0]


def test_a_response_that_fails_harms_no_other(clock: _Clock) -> None:
    class Broken(_Request):
        def deliver(self, news: Items[tuple[float, Delta]]) -> None:
            raise RuntimeError("its client is gone")

    outbox = Outbox()
    good = _Request(clock)
    _step(outbox, Broken(clock), _sequence(0))
    _step(outbox, good, _sequence(1))
    outbox.send_due(0.0)
    assert good.responses == [[0]]
