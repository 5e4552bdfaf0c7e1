"""What a step costs in seconds: measured when the engine loads, corrected while it runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tandem.lookahead.corrected_curve import MAX_RATIO, RATE, CorrectedCurve, clipped
from tandem.lookahead.curve import Curve

# A prompt is over after few passes, and the longer it is, the more its tokens attend to.
_PROMPT_RATE = 0.25
# Passes that are so far out of shape, for so many observations: what was measured is wrong.
_DISTORTED, _LONG = 2.0, 1000


class DraftCosts(NamedTuple):
    """A drafter's round: what it costs to begin, and each guess further, by number of sequences."""

    begin: Curve
    guess: Curve


@dataclass(frozen=True)
class Costs:
    """Costs as they were measured, in seconds.

    Attributes:
        verify: a pass of one sequence and the sampling behind it, by tokens that get logits.
        sequence: what each further sequence adds to a pass.
        prompt_token: what a token adds that gets no logits.
        draft: by drafter.
        spread: by which share repetitions usually took longer than the shortest.
        measured_at: when, in seconds of the system's clock.
    """

    verify: Curve
    sequence: float
    prompt_token: float
    draft: Mapping[str, DraftCosts]
    spread: float = 0.0
    measured_at: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "verify": self.verify.points,
            "sequence": self.sequence,
            "prompt_token": self.prompt_token,
            "draft": {
                name: {"begin": costs.begin.points, "guess": costs.guess.points}
                for name, costs in self.draft.items()
            },
            "spread": self.spread,
            "measured_at": self.measured_at,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Costs:
        """From what `to_json` gave, keys as text.

        Raises:
            ValueError: it is something else.
        """
        try:
            costs = cls(
                verify=_curve(values["verify"]),
                sequence=_seconds(values["sequence"]),
                prompt_token=_seconds(values["prompt_token"]),
                draft={
                    name: DraftCosts(_curve(each["begin"]), _curve(each["guess"]))
                    for name, each in values["draft"].items()
                },
                spread=_seconds(values["spread"]),
                measured_at=_seconds(values["measured_at"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it lacks something: {error!r}") from error
        # Observed times are divided by it.
        if costs.verify(1) == 0:
            raise ValueError("a pass takes no time")
        return costs


def _curve(points: Mapping[str, float]) -> Curve:
    if not points:
        raise ValueError("a curve has no points")
    return Curve({int(count): _seconds(value) for count, value in points.items()})


def _seconds(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no time")
    return value


@dataclass
class _DraftRatios:
    """Corrections of a drafter's costs, from so many rounds."""

    begin: float = 1.0
    guess: float = 1.0
    num_observed: int = 0


class CostModel:
    """Predicts a step's time; what is observed corrects it."""

    def __init__(self, costs: Costs, when_wrong: Callable[[float], object] = float) -> None:
        """Starts with what was measured.

        Args:
            when_wrong: told, once, by how much the measured passes are out of shape, if what is
                observed says so for long.
        """
        self._costs = costs
        self._when_wrong = when_wrong
        self._num_distorted = 0  # observations in a row
        self._verify = CorrectedCurve(costs.verify)
        self._prompt_ratio = 1.0
        self._draft_ratios: defaultdict[str, _DraftRatios] = defaultdict(_DraftRatios)
        self.rest = 0.0  # of a step: scheduling, committing

    def verify(self, num_rows: int, num_sequences: int, num_prompt_tokens: int = 0) -> float:
        """Seconds of a pass and the sampling behind it.

        Args:
            num_rows: tokens that get logits.
            num_prompt_tokens: those that get none.
        """
        costs, rows = self._costs, max(1, num_rows)
        seconds = self._verify(rows)
        # What more sequences add is corrected as what rows cost.
        ratio = seconds / costs.verify(rows)
        seconds += ratio * costs.sequence * max(0, num_sequences - 1)
        return seconds + self._prompt_ratio * costs.prompt_token * num_prompt_tokens

    def draft(self, drafter: str, num_sequences: int, num_guesses: int) -> float:
        """Seconds of a round in which each sequence gets `num_guesses` guesses."""
        if num_guesses == 0:
            return 0.0
        return sum(self._draft_parts(drafter, num_sequences, num_guesses))

    def _draft_parts(
        self, drafter: str, num_sequences: int, num_guesses: int
    ) -> tuple[float, float]:
        """Seconds of beginning, and of guessing."""
        costs, ratios = self._costs.draft[drafter], self._draft_ratios[drafter]
        begin = ratios.begin * costs.begin(num_sequences)
        return begin, ratios.guess * num_guesses * costs.guess(num_sequences)

    def observe_verify(
        self, num_rows: int, num_sequences: int, num_prompt_tokens: int, seconds: float
    ) -> None:
        """Corrects `verify` by what a pass took; beside a prompt, what is said of its tokens."""
        alone = self.verify(num_rows, num_sequences)
        if num_prompt_tokens > 0:
            predicted = self.verify(num_rows, num_sequences, num_prompt_tokens) - alone
            if predicted > 0:
                ratio = clipped((seconds - alone) / predicted)
                self._prompt_ratio *= 1 + _PROMPT_RATE * (ratio - 1)
            return
        self._verify.observe(max(1, num_rows), seconds / alone)
        distortion = self._verify.distortion
        self._num_distorted = self._num_distorted + 1 if distortion > _DISTORTED else 0
        if self._num_distorted == _LONG:
            self._when_wrong(distortion)

    def observe_draft(
        self, drafter: str, num_sequences: int, num_guesses: int, seconds: float
    ) -> None:
        """Corrects `draft` by what a round took: the larger part by the larger share."""
        begin, guess = self._draft_parts(drafter, num_sequences, num_guesses)
        predicted = begin + guess
        if predicted > 0:
            ratios = self._draft_ratios[drafter]
            ratios.num_observed += 1
            rate = max(RATE, 1 / ratios.num_observed) * (clipped(seconds / predicted) - 1)
            # Normalised, so that what is expected of this round moves by the rate.
            rate *= predicted / (begin**2 + guess**2)
            ratios.begin *= 1 + rate * begin
            ratios.guess *= 1 + rate * guess

    def observe_rest(self, seconds: float) -> None:
        """Follows what a step takes besides drafting and verifying."""
        self.rest += RATE * (min(seconds, MAX_RATIO * self.rest + 1e-3) - self.rest)
