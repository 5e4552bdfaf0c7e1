"""Counters of the engine, as plain data; exporting them is done elsewhere."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

PHASES = ("schedule", "draft", "verify", "accept", "commit")
# From here on a temperature is high.
HIGH_TEMPERATURE = 0.9
_MAX_PHASES = 10_000


@dataclass
class Tally:
    """Guesses of which all before were accepted, so that they had their chance."""

    num_tokens: int = 0
    num_accepted: int = 0

    @property
    def num_missed(self) -> int:
        """Those that were rejected."""
        return self.num_tokens - self.num_accepted

    @property
    def share(self) -> float:
        """Of those that had their chance, how many were accepted: it doesn't depend on k."""
        return self.num_accepted / max(1, self.num_tokens)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Adds a round."""
        self.num_tokens += min(num_accepted + 1, num_drafted)
        self.num_accepted += num_accepted


@dataclass
class DrafterStats:
    """What one drafter proposed, and what became of it.

    The acceptance rate is `num_accepted_tokens / num_draft_tokens`. The mean acceptance length is
    `1 + num_accepted_tokens / num_drafts`: it counts the verifier's own token of each round.
    `num_outside_vocabulary` counts rejected guesses whose right token the drafter can't say.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # How often the draft at each position, from 0, was accepted, and had its chance.
    num_accepted_by_position: Counter[int] = field(default_factory=Counter)
    num_tried_by_position: Counter[int] = field(default_factory=Counter)
    tried: Tally = field(default_factory=Tally)
    tried_beyond_trained_length: Tally = field(default_factory=Tally)
    tried_at_high_temperature: Tally = field(default_factory=Tally)
    num_outside_vocabulary: int = 0

    def add_round(self, num_drafted: int, num_accepted: int) -> None:
        """Adds what became of a round with drafts."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        self.num_accepted_by_position.update(range(num_accepted))
        self.num_tried_by_position.update(range(min(num_accepted + 1, num_drafted)))

    def chances(self) -> list[float]:
        """By position, the share accepted of the guesses that had their chance."""
        tried = self.num_tried_by_position
        return [self.num_accepted_by_position[i] / tried[i] for i in sorted(tried)]

    def since(self, before: DrafterStats) -> DrafterStats:
        """What has been added to `before`."""

        def added(new: Any, old: Any) -> Any:
            if isinstance(new, Tally):
                return Tally(*(a - b for a, b in zip(astuple(new), astuple(old), strict=True)))
            return new - old

        return DrafterStats(**{n: added(v, getattr(before, n)) for n, v in vars(self).items()})


@dataclass
class EngineStats:
    """Totals since the engine started."""

    num_steps: int = 0
    num_scheduled_sequences: int = 0  # in all steps
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    # Prompt tokens that were looked for in the prefix cache, and that were there.
    num_prefix_cache_queries: int = 0
    num_prefix_cache_hits: int = 0
    # Seconds of the phases of recent steps, for whoever takes them away.
    phases: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_MAX_PHASES))

    # Seconds of each phase when it last ran.
    last: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def note_prefix_cache(self, num_tokens: int, num_cached_tokens: int) -> None:
        """Counts a prompt that was looked for in the prefix cache, and what was there of it."""
        self.num_prefix_cache_queries += num_tokens
        self.num_prefix_cache_hits += num_cached_tokens

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Records how long a phase took; on a GPU, what it left running counts to a later one."""
        started = time.perf_counter()
        yield
        self.last[phase] = time.perf_counter() - started
        self.phases.append((phase, self.last[phase]))


@dataclass(frozen=True)
class GroupLoad:
    """Blocks of one group of layers.

    Since the engine started, `num_reused` were found in the prefix cache and `num_evicted` given
    away for other tokens.
    """

    num_blocks: int
    num_used: int
    num_reused: int
    num_evicted: int


@dataclass(frozen=True)
class EngineLoad:
    """What the engine holds right now."""

    num_running: int
    num_waiting: int
    groups: dict[str, GroupLoad]
    num_preemptions: int

    @property
    def num_blocks_used(self) -> int:
        """Blocks that belong to a sequence, of all groups."""
        return sum(group.num_used for group in self.groups.values())
