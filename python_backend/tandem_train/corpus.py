"""Token sequences on disk, in numbered shards that grow by whole lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SHARD_SIZE = 500
# Every twentieth sequence is held out.
_HOLD_OUT = 20


@dataclass(frozen=True)
class TrainingText:
    """One sequence: a prompt and what followed.

    `index` is its number in the recipe, which determines it. `temperature` is None for text that
    the verifier didn't write.
    """

    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    temperature: float | None

    @property
    def is_held_out(self) -> bool:
        """Whether training must not see it."""
        return self.index % _HOLD_OUT == _HOLD_OUT - 1


class Corpus:
    """The sequences in a directory. A line that was cut off by a kill is dropped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __iter__(self) -> Iterator[TrainingText]:
        for shard in sorted(self.directory.glob("shard-*.jsonl")):
            for line in shard.read_text(encoding="utf-8").splitlines():
                try:
                    yield TrainingText(**json.loads(line))
                except ValueError:
                    continue

    def append(self, text: TrainingText) -> None:
        """Writes one sequence to its shard."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"shard-{text.index // SHARD_SIZE:04d}.jsonl"
        cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as shard:
            shard.write("\n" * cut_off + json.dumps(asdict(text)) + "\n")
