"""Whether a model writes the same tokens however it is asked."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from tandem import Engine, SamplingParams
from tandem.drafter_config import NO_DRAFTER


@dataclass(frozen=True)
class Comparison:
    """What one way of asking gave, beside plain decoding of one prompt after the other.

    Attributes:
        way: drafter, and how many prompts at a time.
        same: answers that are the same, of `answers`.
        first_difference: tokens that the earliest to part has in common; None if none parts.
    """

    way: str
    temperature: float
    same: int
    answers: int
    first_difference: int | None


def compare(
    engine: Engine,
    drafters: Items[str],
    prompts: Items[str | Items[int]],
    *,
    temperatures: Items[float],
    max_tokens: int,
    batch_size: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Answers all prompts alone and in batches, with each drafter and without.

    Args:
        batch_size: prompts of a batch.
        progress: told of each answer.
    """
    ways = [(NO_DRAFTER, batch_size)]
    ways += [(drafter, size) for drafter in drafters for size in (1, batch_size)]
    comparisons = []
    for temperature in temperatures:
        params = [
            SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
            for seed in range(len(prompts))
        ]
        expected = _answers(engine, NO_DRAFTER, 1, prompts, params, progress)
        for drafter, size in ways:
            found = _answers(engine, drafter, size, prompts, params, progress)
            parted = [_common(a, b) for a, b in zip(found, expected, strict=True) if a != b]
            comparisons.append(
                Comparison(
                    way=f"{drafter}, {size} at a time",
                    temperature=temperature,
                    same=len(found) - len(parted),
                    answers=len(found),
                    first_difference=min(parted, default=None),
                )
            )
    return comparisons


def num_answers(num_drafters: int, num_prompts: int, num_temperatures: int) -> int:
    """How many answers `compare` takes."""
    return (2 + 2 * num_drafters) * num_prompts * num_temperatures


def _answers(
    engine: Engine,
    drafter: str,
    size: int,
    prompts: Items[str | Items[int]],
    params: Items[SamplingParams],
    progress: Callable[[], None],
) -> list[list[int]]:
    found = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        for output in engine.generate(prompts[part], params[part], drafter=drafter):
            found.append(output.token_ids)
            progress()
    return found


def _common(a: Items[int], b: Items[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
