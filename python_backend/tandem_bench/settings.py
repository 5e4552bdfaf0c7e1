"""What a run of the benchmark is asked for, and how it shows how far it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from tandem import EngineConfig, SamplingParams
from tandem_bench.results import Results
from tandem_bench.workload import read_prompts
from tandem_runtime.paths import ROOT

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The load that every part shares.

    Attributes:
        config: the `model.json` of the engine that is measured.
        output: the folder of the results.
        num_prompts: of `prompts/held_out.jsonl`, one of each kind in turn.
        max_tokens: tokens of each answer; an end of sequence doesn't end it.
        rounds: how often everything is measured, in turns.
        concurrencies: requests in flight.
        drafters: "none" for plain decoding, and names of the configuration.
    """

    config: Path = ROOT / "model_repository/tandem/1/model.json"
    output: Path = ROOT / "benchmarks"
    num_prompts: int = 40
    max_tokens: int = 128
    rounds: int = 3
    concurrencies: tuple[int, ...] = (1, 4, 8, 16, 32)
    drafters: tuple[str, ...] = ("none", "mtp", "ngram", "ngram+mtp")

    @property
    def params(self) -> SamplingParams:
        """Greedy, and always to the last token."""
        return SamplingParams(max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True)

    def engine_config(self, **changes: Any) -> EngineConfig:
        """The configuration, with room for the highest concurrency.

        Prefixes are not cached, as prompts repeat.
        """
        config = EngineConfig.from_json(self.config)
        values = {"max_num_seqs": max(self.concurrencies), "enable_prefix_caching": False}
        return dataclasses.replace(config, **values | changes)

    def prompts(self) -> list[list[int]]:
        """The prompts as tokens; every engine that is compared gets these."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.engine_config().verifier)
        return [list(tokenizer(text)["input_ids"]) for text in read_prompts()[: self.num_prompts]]

    def results(self, part: str, names: Items[str], **more: Any) -> Results:
        """The file of one part; `names` are the settings above that its figures depend on."""
        chosen = {name: getattr(self, name) for name in names}
        model = json.loads(self.config.read_text(encoding="utf-8"))
        return Results(self.output / f"{part}.json", {**chosen, **more, "model": model})


def turned(items: Items[T], by: int) -> list[T]:
    """The items, begun elsewhere in each round, so that none is always measured first."""
    start = by % len(items)
    return [*items[start:], *items[:start]]


class Bar:
    """One line that shows what is measured, how much is done, and since when."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def say(self, text: str) -> None:
        """Shows what is going on."""
        self._progress.update(self._task, description=text)

    def advance(self, count: float = 1) -> None:
        """Some of it is done."""
        self._progress.advance(self._task, count)


@contextmanager
def bar(part: str, total: int, results: Results | None = None) -> Iterator[Bar]:
    """A progress bar; it says what is kept of an earlier run, and why if nothing is."""
    columns = (
        TextColumn(part),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as progress:
        if results is not None and results.dropped:
            progress.console.print(
                f"{part}: begun anew, as it differs from what is in {results.path.name}: "
                + ", ".join(results.dropped)
            )
        elif results is not None and results.cells:
            progress.console.print(f"{part}: {len(results.cells)} results are there already")
        yield Bar(progress, total)
