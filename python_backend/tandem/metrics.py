"""Counters of the engine, as plain data; exporting them is done elsewhere."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("schedule", "draft", "verify", "accept", "commit")
_MAX_PHASES = 10_000


@dataclass
class DrafterStats:
    """What one drafter proposed, and what became of it.

    The acceptance rate is `num_accepted_tokens / num_draft_tokens`. The mean acceptance length is
    `1 + num_accepted_tokens / num_drafts`: it counts the verifier's own token of each round.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # How often the draft at each position, from 0, was accepted.
    num_accepted_by_position: Counter[int] = field(default_factory=Counter)


@dataclass
class EngineStats:
    """Totals since the engine started."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    # Seconds of the phases of recent steps, for whoever takes them away.
    phases: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_MAX_PHASES))

    # Seconds of each phase when it last ran.
    last: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Records how long a phase took; on a GPU, what it left running counts to a later one."""
        started = time.perf_counter()
        yield
        self.last[phase] = time.perf_counter() - started
        self.phases.append((phase, self.last[phase]))


@dataclass(frozen=True)
class EngineLoad:
    """What the engine holds right now."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_used: int
    num_preemptions: int
