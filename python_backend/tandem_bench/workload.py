"""What is run: prompts in an order that mixes their kinds, and one way to choose tokens."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence as Items
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import TypeVar

from tandem_runtime.paths import ROOT

T = TypeVar("T")

PROMPTS = ROOT / "prompts" / "held_out.jsonl"


def read_prompts(path: Path = PROMPTS) -> list[str]:
    """The prompts of a file, one of each kind in turn, so that any first few are a fair sample.

    Raises:
        ValueError: see `prompts_by_kind`.
    """
    kinds = prompts_by_kind(path).values()
    return [prompt for turn in zip_longest(*kinds) for prompt in turn if prompt]


def prompts_by_kind(path: Path = PROMPTS) -> dict[str, list[str]]:
    """The prompts of a file.

    Raises:
        ValueError: naming the first line that isn't `{"kind": ..., "prompt": ...}`.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            by_kind[entry["kind"]].append(entry["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"kind": ..., "prompt": ...}}, got {line!r}'
            ) from error
    return dict(by_kind)


def repeat_to_fill(prompts: Items[T], concurrency: int) -> list[T]:
    """The prompts, begun anew as far as it takes to fill whole rounds of `concurrency`.

    Without this the last round of a run would be at a lower concurrency than it says.
    """
    count = -(-len(prompts) // concurrency) * concurrency
    return list(islice(cycle(prompts), count))


def prompt_of_length(prompts: Items[list[int]], length: int, offset: int = 0) -> list[int]:
    """`length` tokens of running text: prompts one after the other, from number `offset` on."""
    start = offset % len(prompts)
    text = chain.from_iterable(cycle([*prompts[start:], *prompts[:start]]))
    return list(islice(text, length))
