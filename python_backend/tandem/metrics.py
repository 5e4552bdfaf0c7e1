"""Counters of the engine, as plain data; exporting them is done elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DrafterStats:
    """What one drafter proposed, and what became of it.

    The acceptance rate is `num_accepted_tokens / num_draft_tokens`. The mean acceptance length is
    `1 + num_accepted_tokens / num_drafts`: it counts the verifier's own token of each round.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass
class EngineStats:
    """Totals since the engine started."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0


@dataclass(frozen=True)
class EngineLoad:
    """What the engine holds right now."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_used: int
    num_preemptions: int
