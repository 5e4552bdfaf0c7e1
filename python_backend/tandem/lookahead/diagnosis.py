"""Why speculation gains little: what is wrong, the figure that shows it, and what to do."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from tandem.lookahead.costs import CostModel
from tandem.metrics import DrafterStats, EngineStats, Tally

logger = logging.getLogger("tandem")

# Guesses that must have met the verifier before anything is said.
_MIN_TRIED = 40
_SECONDS = 60.0
# Shares of tried guesses that are accepted: a wrong pair stays below the first, and a good one is
# above the last; what lies between pays or not, as costs have it.
_HOPELESS = 0.05
_GOOD = 0.6
# A speed-up below this is none.
_GAIN = 1.03
# A part of the traffic matters if it is this much of it, and is bad if it does so much worse.
_PART = 0.3
_WORSE = 0.7


class Reason(StrEnum):
    """What may be wrong."""

    WRONG_PAIR = "wrong_pair"
    OUTSIDE_VOCABULARY = "outside_vocabulary"
    LONG_CONTEXT = "long_context"
    HIGH_TEMPERATURE = "high_temperature"
    SLOW_DRAFTER = "slow_drafter"
    LARGE_BATCH = "large_batch"
    OTHER_DOMAIN = "other_domain"


ADVICE = {
    Reason.WRONG_PAIR: (
        "share of guesses accepted, near zero from the start: this drafter belongs to another "
        "verifier, or to other weights or a quantised form of it; load the matching pair"
    ),
    Reason.OUTSIDE_VOCABULARY: (
        "share of the rejected guesses whose right token the drafter can't say: train one with a "
        "larger draft vocabulary, or on text like this"
    ),
    Reason.LONG_CONTEXT: (
        "share accepted beyond the length that the drafter was trained on, where it does much "
        "worse: train it on longer texts, or name another drafter for long prompts"
    ),
    Reason.HIGH_TEMPERATURE: (
        "share accepted at temperatures from 0.9, where it does much worse than below: expect "
        "less from hot sampling, or train the drafter on text sampled like this"
    ),
    Reason.SLOW_DRAFTER: (
        "times the speed of plain decoding at best, alone: a guess costs too much for its chance "
        "to be accepted; take a smaller drafter, or ngram"
    ),
    Reason.LARGE_BATCH: (
        "sequences in a batch, in which a verifier pass has no time to spare for drafts that "
        "would pay alone: drafting stops by itself; to be faster for each, run fewer at once"
    ),
    Reason.OTHER_DOMAIN: (
        "share of guesses accepted, on text that this drafter guesses badly: train it on such "
        "text, try ngram or ngram+DRAFTER, or lower num_speculative_tokens"
    ),
}


class Finding(NamedTuple):
    """One reason, and the figure behind it."""

    reason: Reason
    figure: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.reason.value}: {self.figure:.2f} {ADVICE[self.reason]}"


class Speedup(NamedTuple):
    """The lookahead that is best for a batch, and how much faster than plain decoding it is."""

    num_speculative_tokens: int
    factor: float


def best_speedup(
    costs: CostModel, drafter: str, chances: list[float], batch_size: int, max_lookahead: int
) -> Speedup:
    """What fixed lookaheads would bring to `batch_size` sequences.

    Args:
        chances: of a guess at each position to be accepted if those before it are; the last one
            stands for all behind it.
    """
    plain = costs.rest + costs.verify(batch_size, batch_size)
    padded = chances + [chances[-1]] * max_lookahead
    gains = list(accumulate(padded[:max_lookahead], mul))
    best = Speedup(0, 1.0)
    for k in range(1, max_lookahead + 1):
        seconds = (
            costs.rest
            + costs.draft(drafter, batch_size, k)
            + costs.verify(batch_size * (1 + k), batch_size)
        )
        factor = (1 + sum(gains[:k])) * plain / seconds
        if factor > best.factor:
            best = Speedup(k, factor)
    return best


def diagnose(
    stats: DrafterStats,
    costs: CostModel | None = None,
    drafter: str = "",
    batch_size: float = 1.0,
    max_lookahead: int = 1,
) -> list[Finding]:
    """What keeps a drafter from paying, the most telling reason first; empty if nothing does.

    Args:
        stats: what became of its guesses over some time.
        costs: of its drafting; without, only acceptance is judged.
        batch_size: sequences of a step over that time.
    """
    if stats.tried.num_tokens < _MIN_TRIED:
        return []
    share = stats.tried.share
    if share < _HOPELESS:
        return [Finding(Reason.WRONG_PAIR, share)]
    findings = []
    if share < _GOOD and stats.num_outside_vocabulary > 0.5 * stats.tried.num_missed:
        missing = stats.num_outside_vocabulary / stats.tried.num_missed
        findings.append(Finding(Reason.OUTSIDE_VOCABULARY, missing))
    for reason, part in (
        (Reason.LONG_CONTEXT, stats.tried_beyond_trained_length),
        (Reason.HIGH_TEMPERATURE, stats.tried_at_high_temperature),
    ):
        if _does_worse(part, stats.tried):
            findings.append(Finding(reason, part.share))
    if costs is not None:
        findings += _judge_costs(stats, costs, drafter, batch_size, max_lookahead)
    if not findings and share < _GOOD:
        findings.append(Finding(Reason.OTHER_DOMAIN, share))
    return findings


def _does_worse(part: Tally, whole: Tally) -> bool:
    rest = Tally(whole.num_tokens - part.num_tokens, whole.num_accepted - part.num_accepted)
    if part.num_tokens < max(_MIN_TRIED, _PART * whole.num_tokens) or part.share >= _GOOD:
        return False
    return rest.num_tokens >= _MIN_TRIED and part.share < _WORSE * rest.share


def _judge_costs(
    stats: DrafterStats, costs: CostModel, drafter: str, batch_size: float, max_lookahead: int
) -> list[Finding]:
    chances = stats.chances()
    alone = best_speedup(costs, drafter, chances, 1, max_lookahead).factor
    together = best_speedup(costs, drafter, chances, round(batch_size), max_lookahead).factor
    if alone < _GAIN:
        return [Finding(Reason.SLOW_DRAFTER, alone)]
    if together < _GAIN:
        return [Finding(Reason.LARGE_BATCH, batch_size)]
    return []


class Monitor:
    """Diagnoses every drafter once a minute, and logs what it finds."""

    def __init__(self, judge: Callable[[str, DrafterStats, float], list[Finding]]) -> None:
        """Starts with nothing found; `judge` takes a drafter, its stats and the batch size."""
        self._judge = judge
        self._due = time.monotonic() + _SECONDS
        self._before: dict[str, DrafterStats] = {}
        self._engine_before = EngineStats()
        self.findings: dict[str, list[Finding]] = {}

    def update(self, engine: EngineStats, drafters: Mapping[str, DrafterStats]) -> None:
        """Looks at what was added since the last time, if that was long enough ago."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _SECONDS
        steps = engine.num_steps - self._engine_before.num_steps
        scheduled = engine.num_scheduled_sequences - self._engine_before.num_scheduled_sequences
        for name, stats in drafters.items():
            added = stats.since(self._before.get(name, DrafterStats()))
            if added.tried.num_tokens < _MIN_TRIED:
                continue  # too few to say anything; they count next time
            self._before[name] = copy.deepcopy(stats)
            self.findings[name] = self._judge(name, added, scheduled / max(1, steps))
            for finding in self.findings[name]:
                logger.warning("speculation with %s gains little: %s", name, finding)
        self._engine_before = copy.deepcopy(engine)
