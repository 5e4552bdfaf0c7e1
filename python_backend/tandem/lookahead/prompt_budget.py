"""How many tokens of prompts join a step: what those that decode, and other prompts, can bear."""

from __future__ import annotations

from typing import NamedTuple

from tandem.lookahead.costs import CostModel

# So much is used of what a prompt may cost others: predictions scatter. What steps left unused may
# be used at once, of so many steps at most: short prompts are not worth cutting.
_CAUTION = 0.9
_MAX_SAVED_STEPS = 8.0
# A step computes prompts for so many times as long as the least pass takes, then begins no further
# one: what passes cost at least is a small part by then, and first tokens wait for all of a pass.
_PORTION = 4.0


class PromptLimits(NamedTuple):
    """Tokens of prompts in a step; None for any number.

    Attributes:
        most: a prompt is cut where there would be more.
        enough: with so many, no further prompt joins the step.
        later: so many may come in a later step, if prompts wait for it.
    """

    most: int | None = None
    enough: int | None = None
    later: int = 0


NO_LIMITS = PromptLimits()


class PromptBudget:
    """Holds decoding sequences up by a set share, and prompts by one another as little as pays."""

    def __init__(self, costs: CostModel, max_slowdown: float) -> None:
        """Starts with what was measured.

        Args:
            max_slowdown: how many times as long steps may take for the sake of prompts, on the
                average of several.
        """
        self._costs = costs
        self._max_slowdown = max_slowdown
        self._saved_steps = _MAX_SAVED_STEPS
        self._weight = 1.0

    def limits(self, num_decoding: int, num_prompts: int) -> PromptLimits:
        """Of a step in which so many sequences decode.

        Args:
            num_prompts: sequences that have no token yet, whether they are admitted or wait.
        """
        least = self._costs.verify(1, 1)
        token = self._costs.verify(1, 1, 1) - least
        if token <= 0:
            return NO_LIMITS
        enough = max(1, int(_PORTION * least / token))
        if num_decoding == 0:
            return PromptLimits(enough=enough)
        # Few don't hold up many.
        self._weight = max(1.0, num_prompts / num_decoding)
        allowed = self._allowance(num_decoding) / token
        later = max(1, int((1 + _MAX_SAVED_STEPS) * allowed))
        if self._saved_steps == _MAX_SAVED_STEPS:
            return PromptLimits(later, enough, later)
        return PromptLimits(int((1 + self._saved_steps) * allowed), enough, later)

    def _allowance(self, num_decoding: int) -> float:
        """Seconds that prompts may take of a step in which so many sequences decode."""
        alone = self._costs.verify(num_decoding, num_decoding) + self._costs.rest
        return self._weight * _CAUTION * (self._max_slowdown - 1) * alone

    def observe(self, num_decoding: int, seconds: float) -> None:
        """Learns for how long a step computed prompts, beside so many sequences that decoded."""
        used = seconds / self._allowance(num_decoding) if num_decoding > 0 else 0.0
        self._saved_steps = min(max(self._saved_steps + 1 - used, -1.0), _MAX_SAVED_STEPS)
