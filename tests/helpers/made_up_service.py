"""A service whose guesses are right by chance, on a clock that follows made-up costs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import count

from made_up_costs import costs
from tandem import SamplingParams, Sequence
from tandem.lookahead.costs import CostModel
from tandem.lookahead.lookahead import Lookahead, draft_limit
from tandem.requests.sequence import Draft, ScheduledSequence

LIMIT = 8
NUM_TOKENS = 128


def sequence(
    num_prompt: int, num_output: int, max_tokens: int, limit: int, number: int = 0
) -> Sequence:
    return Sequence(
        id=number,
        token_ids=[9] * (num_prompt + num_output),
        num_prompt_tokens=num_prompt,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        seed=0,
        drafter="model",
        max_lookahead=limit,
        num_computed=num_prompt + num_output - 1,
    )


class Service:
    """Keeps `concurrency` sequences running; each is luckier or less so than `acceptance`."""

    def __init__(self, lookahead: Lookahead, concurrency: int, acceptance: float) -> None:
        self._lookahead = lookahead
        self._acceptance = acceptance
        self._random = random.Random(0)
        self._truth = CostModel(costs("model"))
        self._ids = count()
        self._chances: dict[Sequence, float] = {}
        self._running = [self._arrive() for _ in range(concurrency)]
        self.lengths: list[int] = []  # drafts of each sequence in each step

    def _arrive(self) -> Sequence:
        arrived = sequence(8, 1, NUM_TOKENS, LIMIT, next(self._ids))
        # The same for everyone's n-th sequence, so that services can be compared.
        chance = random.Random(arrived.id).gauss(self._acceptance, 0.2)
        self._chances[arrived] = min(0.97, max(0.01, chance))
        return arrived

    def rate(self, seconds: float, fixed: int | None = None) -> float:
        """Tokens a second; with `fixed` drafts if the lookahead leaves it to its caller."""
        tokens = spent = 0.0
        while spent < seconds:
            took = self._step(fixed)
            spent += sum(took.values())
            tokens += sum(self._commit())
        return tokens / spent

    def _step(self, fixed: int | None) -> dict[str, float]:
        self._batch = []
        for running in self._running:
            limit = draft_limit(running, 10**6)
            limit = limit if fixed is None else min(fixed, limit)
            self._batch.append(ScheduledSequence(running, 1, limit))
        self._lookahead.plan(self._batch)
        drafting = [s for s in self._batch if s.num_draft_tokens > 0]
        depth = self._draft(drafting)
        self._lookahead.choose(self._batch)
        self._accepted = []
        for scheduled in self._batch:
            self.lengths.append(scheduled.num_draft_tokens)
            chances = self._truths.get(scheduled, [])[: scheduled.num_draft_tokens]
            hits = [self._random.random() < chance for chance in chances]
            self._accepted.append((*hits, False).index(False))
        rows = len(self._batch) + sum(s.num_draft_tokens for s in self._batch)
        seconds = {
            "schedule": 1e-4,
            "draft": self._truth.draft("model", len(drafting), depth),
            "verify": self._truth.verify(rows, len(self._batch)),
            "accept": 0.0,
            "commit": 1e-4,
        }
        self._lookahead.observe(self._batch, self._accepted, seconds)
        return seconds

    def _draft(self, drafting: Items[ScheduledSequence]) -> int:
        """The drafter knows, more or less, which of its guesses are good."""
        self._truths: dict[ScheduledSequence, list[float]] = {s: [] for s in drafting}
        drafts = {s: Draft([], []) for s in drafting}
        depth = 0
        for step in range(max((s.num_draft_tokens for s in drafting), default=0)):
            known = [drafts[s].confidences for s in drafting]
            if step > 0 and not self._lookahead.goes_on([s.sequence for s in drafting], known):
                break
            depth += 1
            for scheduled in drafting:
                mean = self._chances[scheduled.sequence]
                good = self._random.random() < mean
                chance = mean + (1 - mean) * 0.8 if good else mean * 0.2
                self._truths[scheduled].append(chance)
                drafts[scheduled].token_ids.append(1)
                noisy = min(1.0, max(0.0, chance + self._random.gauss(0, 0.1)))
                drafts[scheduled].confidences.append(noisy)
        for scheduled in drafting:
            scheduled.draft = drafts[scheduled].first(scheduled.num_draft_tokens)
        return depth

    def _commit(self) -> Iterator[int]:
        for index, accepted in enumerate(self._accepted):
            running = self._running[index]
            running.token_ids += [9] * (accepted + 1)
            running.num_computed += accepted + 1
            yield accepted + 1
            if running.num_output_tokens >= NUM_TOKENS:
                self._lookahead.forget(running)
                self._running[index] = self._arrive()
