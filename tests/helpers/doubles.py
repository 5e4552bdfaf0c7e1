"""Test doubles for drafters, and short ways to run an engine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

from tandem import Engine, SamplingParams, Sequence
from tandem.drafters.drafter import Drafter, DraftRequest, GoesOn, always
from tandem.requests.sequence import Draft


class OracleDrafter(Drafter):
    """Always right: it replays what plain decoding generated for the request's seed."""

    def __init__(self, outputs: Mapping[int, list[int]]) -> None:
        self._outputs = outputs

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        return [Draft(self._continue(r.sequence, r.num_tokens)) for r in requests]

    def _continue(self, sequence: Sequence, count: int) -> list[int]:
        start = sequence.num_output_tokens
        return self._outputs[sequence.seed][start : start + count]


class WrongDrafter(OracleDrafter):
    """Always wrong, from the first draft on."""

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = super().propose(requests)
        return [Draft([token ^ 1 for token in draft.token_ids]) for draft in drafts]


class HalfDrafter(OracleDrafter):
    """Right once or twice, then wrong: something is accepted and something rejected."""

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = super().propose(requests)
        for request, (token_ids, *_) in zip(requests, drafts, strict=True):
            right = 1 + request.sequence.num_output_tokens % 2
            token_ids[right:] = [token ^ 1 for token in token_ids[right:]]
        return drafts


def prompt_of(length: int, seed: int = 0, vocab_size: int = 384) -> list[int]:
    """Random token ids, none of them special."""
    return random.Random(1000 * seed + length).choices(range(6, vocab_size), k=length)


def run(engine: Engine, sequences: Items[Sequence], max_steps: int = 2000) -> None:
    """Adds the sequences and steps until all have ended."""
    for sequence in sequences:
        engine.add(sequence)
    finish(engine, max_steps)


def send(
    engine: Engine, *requests: tuple[list[int], SamplingParams], **options: Any
) -> list[Sequence]:
    """Runs requests together; the sequences."""
    sequences = [engine.make_sequence(*request, **options) for request in requests]
    run(engine, sequences)
    return sequences


def finish(engine: Engine, max_steps: int = 2000) -> None:
    """Steps until nothing is left, checking the pool each time."""
    for _ in range(max_steps):
        if not engine.has_work:
            return
        engine.step()
        engine.check_integrity()
    raise AssertionError(f"still working after {max_steps} steps")


def plain(engine: Engine, requests: Items[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """What decoding without any drafter generates for each request."""
    return tokens_of(engine, requests, drafter="none")


def tokens_of(
    engine: Engine,
    requests: Items[tuple[list[int], SamplingParams]],
    *,
    drafter: str | None = None,
) -> list[list[int]]:
    """What a drafter, or the default one, generates for each request."""
    sequences = [
        engine.make_sequence(prompt, params, drafter=drafter) for prompt, params in requests
    ]
    run(engine, sequences)
    return [sequence.output_ids for sequence in sequences]
