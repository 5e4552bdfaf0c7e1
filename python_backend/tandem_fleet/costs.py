"""What a step of the engine costs, as it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Any


class Curve:
    """Seconds by count: straight lines between the measured points, and beyond them."""

    def __init__(self, points: Mapping[str, float]) -> None:
        self._points = sorted((int(count), float(seconds)) for count, seconds in points.items())
        self._known: dict[int, float] = {}

    def __call__(self, count: int) -> float:
        """Seconds at `count`; below the first point as there."""
        if count not in self._known:
            self._known[count] = self._interpolate(count)
        return self._known[count]

    def _interpolate(self, count: int) -> float:
        points = self._points
        if len(points) == 1 or count <= points[0][0]:
            return points[0][1]
        pairs = list(pairwise(points))
        low, high = next((pair for pair in pairs if count <= pair[1][0]), pairs[-1])
        share = (count - low[0]) / (high[0] - low[0])
        return low[1] + share * (high[1] - low[1])


class Costs:
    """What a step costs, in seconds, as the backend measures it when it loads.

    Args:
        values: `verify`, a pass of one sequence by tokens that get logits; `sequence`, what each
            further one adds; `prompt_token`, what a token of a prompt adds; and `draft`, by
            drafter: what a round costs to `begin`, and each `guess`, by number of sequences.
        drafter: one of those, or "none".
        acceptance: the chance of each guess, if those before it were accepted.
        rest: seconds of a step beside all this: scheduling, and what goes to Triton and back.

    Raises:
        ValueError: the values are no such thing, or lack the drafter.
    """

    def __init__(
        self, values: Any, drafter: str, acceptance: Sequence[float], rest: float = 0.0
    ) -> None:
        self._rest = rest
        try:
            self._verify = Curve(values["verify"])
            self._sequence = float(values["sequence"])
            self._prompt_token = float(values["prompt_token"])
            draft = values["draft"][drafter] if drafter != "none" else {"begin": {"1": 0}}
            self._begin = Curve(draft["begin"])
            self._guess = Curve(draft.get("guess", {"1": 0}))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no costs of drafter {drafter!r}: {error!r}") from error
        chances = acceptance if drafter != "none" else ()
        self._gains: list[float] = list(accumulate(accumulate(chances, mul), initial=1.0))
        self._best: dict[int, int] = {}

    @property
    def max_lookahead(self) -> int:
        """Guesses of a round at most."""
        return len(self._gains) - 1

    def step(self, num_sequences: int, num_prompt_tokens: int, lookahead: int) -> float:
        """Seconds of a step in which all sequences draft `lookahead` tokens."""
        rows = max(1, num_sequences * (lookahead + 1))
        seconds = self._rest + self._verify(rows) + self._sequence * max(0, num_sequences - 1)
        if lookahead:
            seconds += self._begin(num_sequences) + lookahead * self._guess(num_sequences)
        return seconds + self._prompt_token * num_prompt_tokens

    def max_prompt_tokens(self, num_decoding: int, slowdown: float) -> int:
        """Tokens of prompts with which a step takes at most `slowdown` times as long."""
        spare = (slowdown - 1) * self.step(num_decoding, 0, 0)
        return max(1, int(spare / self._prompt_token)) if self._prompt_token > 0 else 2**31

    def tokens(self, lookahead: int) -> float:
        """Tokens that a step is expected to give a sequence."""
        return self._gains[lookahead]

    def best_lookahead(self, num_sequences: int) -> int:
        """The lookahead with the most tokens a second; 0 when drafting doesn't pay."""
        if num_sequences not in self._best:
            self._best[num_sequences] = max(
                range(self.max_lookahead + 1),
                key=lambda k: self.tokens(k) / self.step(num_sequences, 0, k),
            )
        return self._best[num_sequences]
