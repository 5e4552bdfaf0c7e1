"""Lets a drafter guess on a few prompts, and judges it as the engine does in service."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from tandem import Engine, SamplingParams
from tandem.errors import ConfigError
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.diagnosis import Finding, Speedup, best_speedup
from tandem.metrics import DrafterStats

# A few of each kind of text; a user's own prompts say more.
PROMPTS = (
    "def fibonacci(n):\n    ",
    "The history of the railway begins with",
    "Dear Ms. Lopez,\n\nThank you for your letter of 3 May about",
    "Q: Why is the sky blue?\nA:",
    '{"name": "Ada", "year": 1815}\n{"name": "Alan", "year": 1912}\n{"name": ',
    "Once upon a time, in a village by the sea,",
    "1, 2, 4, 8, 16, ",
    "Ingredients: flour, butter, sugar.\nInstructions:\n1. ",
)
TEMPERATURES = (0.0, 1.0)
BATCH_SIZES = (1, 4, 16, 64)


@dataclass(frozen=True)
class Acceptance:
    """What became of the guesses at one temperature, and what that is worth."""

    stats: DrafterStats
    speedups: Mapping[int, Speedup]  # by sequences in a batch

    @property
    def mean_length(self) -> float:
        """Tokens of a round, the verifier's own included."""
        return 1 + self.stats.num_accepted_tokens / max(1, self.stats.num_drafts)


@dataclass(frozen=True)
class Checkup:
    """What was found. `seconds` are of a verifier pass and of a guess, for one sequence."""

    drafter: str
    acceptance: Mapping[float, Acceptance]  # by temperature
    verify_seconds: float
    guess_seconds: float
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "drafter": self.drafter,
            "verify_seconds": self.verify_seconds,
            "guess_seconds": self.guess_seconds,
            "temperatures": {
                f"{temperature:g}": {
                    "mean_acceptance_length": each.mean_length,
                    "acceptance_by_position": each.stats.chances(),
                    "speedups": {size: s._asdict() for size, s in each.speedups.items()},
                }
                for temperature, each in self.acceptance.items()
            },
            "findings": [
                {"reason": f.reason.value, "figure": f.figure, "text": str(f)}
                for f in self.findings
            ],
        }


def check(
    engine: Engine,
    drafter: str,
    prompts: Items[str | Items[int]] = PROMPTS,
    *,
    temperatures: Items[float] = TEMPERATURES,
    max_tokens: int = 64,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> Checkup:
    """Lets the drafter make as many guesses a round as it may, at each temperature.

    Args:
        batch_size: sequences of a step that the verdict is for.
        progress: told of the tokens that each step added.

    Raises:
        ConfigError: the engine's lookahead is fixed, so it has measured no costs.
    """
    if not isinstance(engine.lookahead, AdaptiveLookahead):
        raise ConfigError('lookahead: a checkup needs "adaptive", whose costs are measured')
    costs, limit = engine.lookahead.costs, engine.config.max_lookaheads[drafter]
    start = copy.deepcopy(engine.drafter_stats[drafter])
    acceptance = {}
    for temperature in temperatures:
        before = copy.deepcopy(engine.drafter_stats[drafter])
        for seed, prompt in enumerate(prompts):
            params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
            engine.add(
                engine.make_sequence(prompt, params, drafter=drafter, num_speculative_tokens=limit)
            )
        while engine.has_work:
            progress(sum(len(delta.token_ids) for delta in engine.step()))
        stats = engine.drafter_stats[drafter].since(before)
        chances = stats.chances() or [0.0]
        sizes = sorted({*BATCH_SIZES, batch_size})
        speedups = {n: best_speedup(costs, drafter, chances, n, limit) for n in sizes}
        acceptance[temperature] = Acceptance(stats, speedups)
    added = engine.drafter_stats[drafter].since(start)
    return Checkup(
        drafter=drafter,
        acceptance=acceptance,
        verify_seconds=costs.verify(1, 1),
        guess_seconds=costs.draft(drafter, 1, 2) - costs.draft(drafter, 1, 1),
        findings=engine.diagnose(drafter, added, batch_size),
    )
