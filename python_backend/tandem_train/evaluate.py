"""Stage 3: what a drafter is worth, through the engine itself, on prompts it never saw."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from tandem import Engine, EngineConfig, SamplingParams
from tandem.drafter_config import NO_DRAFTER
from tandem.models.verifier import VerifierOutput
from tandem.requests.sequence import ScheduledSequence

DRAFTER = "drafter"


class Prompt(NamedTuple):
    """A prompt and the kind of text that it asks for."""

    kind: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a file of lines such as `{"kind": "prose", "prompt": "..."}`.

    Raises:
        ValueError: naming the first line that is not like this.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompts.append(Prompt(str(entry.get("kind", "text")), str(entry["prompt"])))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"kind": ..., "prompt": ...}}, got {line!r}'
            ) from error
    return prompts


class TimedEngine(Engine):
    """Measures how long the drafter and the verifier take."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.draft_seconds: list[float] = []
        self.verify_seconds: list[float] = []

    def draft(self, batch: list[ScheduledSequence]) -> None:
        """As `Engine.draft`; the time of a round that made drafts is kept."""
        started = time.perf_counter()
        super().draft(batch)
        _wait(self.verifier.model.device)
        if any(scheduled.draft_ids for scheduled in batch):
            self.draft_seconds.append(time.perf_counter() - started)

    def verify(self, batch: list[ScheduledSequence]) -> VerifierOutput:
        """As `Engine.verify`; the time of a pass over drafts is kept."""
        started = time.perf_counter()
        output = super().verify(batch)
        _wait(self.verifier.model.device)
        if any(scheduled.draft_ids for scheduled in batch):
            self.verify_seconds.append(time.perf_counter() - started)
        return output


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Tally:
    """Counts over some prompts, decoded with the drafter and plainly."""

    accepted: list[int] = field(default_factory=list)  # rounds that accepted position 1, 2, ...
    num_rounds: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    plain_num_tokens: int = 0
    plain_seconds: float = 0.0
    num_prompts: int = 0
    num_same: int = 0

    def add(self, other: Tally) -> None:
        """Adds another tally to this one."""
        length = max(len(self.accepted), len(other.accepted))
        pairs = [(_at(self.accepted, i), _at(other.accepted, i)) for i in range(length)]
        for name in vars(self):
            if name != "accepted":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accepted = [a + b for a, b in pairs]

    def summary(self) -> dict[str, Any]:
        """The figures that are reported."""
        speed = self.num_tokens / self.seconds
        plain_speed = self.plain_num_tokens / self.plain_seconds
        rounds = max(1, self.num_rounds)
        return {
            "prompts": self.num_prompts,
            "mean_acceptance_length": round(1 + sum(self.accepted) / rounds, 3),
            "acceptance_by_position": [round(n / rounds, 3) for n in self.accepted],
            "tokens_per_second": round(speed, 2),
            "plain_tokens_per_second": round(plain_speed, 2),
            "ratio": round(speed / plain_speed, 3),
            "same_text": self.num_same,
        }


def _at(values: list[int], index: int) -> int:
    return values[index] if index < len(values) else 0


def evaluate(
    verifier: str,
    drafter: dict[str, Any],
    prompts: Items[Prompt],
    *,
    max_tokens: int = 128,
    temperatures: Items[float] = (0.0, 1.0),
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Answers every prompt with the drafter and plainly, one request at a time.

    Args:
        drafter: its settings, as in `model.json`.
        temperatures: each is a table of its own.

    Returns:
        `results`: temperature -> kind -> figures; kind "all" stands for all prompts together.
        `drafter_seconds`, `verifier_seconds`: medians of a round of drafts, and of the pass over
        them.
    """
    engine = TimedEngine(
        EngineConfig(
            verifier=verifier,
            dtype=dtype,
            device=device,
            drafters={DRAFTER: drafter},
            max_num_seqs=1,
            lookahead="fixed",
            # Both ways get the same prompts, one after the other.
            enable_prefix_caching=False,
        )
    )
    lookahead = engine.config.drafter_configs[DRAFTER].num_speculative_tokens
    warm_up = SamplingParams(max_tokens=8, temperature=0.0)
    for name in (DRAFTER, NO_DRAFTER):
        list(engine.generate([prompts[0].text], warm_up, drafter=name))
    engine.draft_seconds.clear()
    engine.verify_seconds.clear()
    results: dict[str, dict[str, Tally]] = {}
    with tqdm(total=len(prompts) * len(temperatures), unit=" prompts", desc="evaluate") as bar:
        for temperature in temperatures:
            tallies: dict[str, Tally] = defaultdict(Tally)
            results[f"{temperature:g}"] = tallies
            for number, prompt in enumerate(prompts):
                params = SamplingParams(
                    max_tokens=max_tokens, temperature=temperature, seed=seed + number
                )
                tally = _answer(engine, prompt.text, params, lookahead, drafter_first=number % 2)
                tallies[prompt.kind].add(tally)
                tallies["all"].add(tally)
                mean = tallies["all"].summary()["mean_acceptance_length"]
                bar.set_postfix_str(f"temperature {temperature:g}, mean length {mean:.2f}")
                bar.update()
    return {
        "verifier": Path(verifier).name,
        "dtype": str(engine.verifier.model.dtype).removeprefix("torch."),
        "device": engine.verifier.model.device.type,
        "num_threads": torch.get_num_threads(),
        "num_speculative_tokens": lookahead,
        "max_tokens": max_tokens,
        "drafter_seconds": _median(engine.draft_seconds),
        "verifier_seconds": _median(engine.verify_seconds),
        "results": {
            temperature: {kind: tally.summary() for kind, tally in tallies.items()}
            for temperature, tallies in results.items()
        },
    }


def _median(values: Items[float]) -> float:
    return round(sorted(values)[len(values) // 2], 5) if values else 0.0


def _answer(
    engine: Engine, prompt: str, params: SamplingParams, lookahead: int, *, drafter_first: int
) -> Tally:
    tally = Tally(accepted=[0] * lookahead, num_prompts=1)
    texts = {}
    # Taking turns at going first evens out what the machine does meanwhile.
    for name in (DRAFTER, NO_DRAFTER) if drafter_first else (NO_DRAFTER, DRAFTER):
        sequence = engine.make_sequence(prompt, params, drafter=name)
        engine.add(sequence)
        started = time.perf_counter()
        while not sequence.is_finished:
            for delta in engine.step():
                if delta.num_draft_tokens:
                    tally.num_rounds += 1
                    for position in range(delta.num_accepted_tokens):
                        tally.accepted[position] += 1
        seconds = time.perf_counter() - started
        texts[name] = sequence.output_ids
        if name == NO_DRAFTER:
            tally.plain_num_tokens, tally.plain_seconds = sequence.num_output_tokens, seconds
        else:
            tally.num_tokens, tally.seconds = sequence.num_output_tokens, seconds
    tally.num_same = int(texts[DRAFTER] == texts[NO_DRAFTER])
    return tally


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    return "\n".join(_lines(report))


def _lines(report: dict[str, Any]) -> Iterable[str]:
    for temperature, kinds in report["results"].items():
        yield f"temperature {temperature}"
        yield (
            f"  {'kind':12} {'mean length':>11} {'tokens/s':>9} {'plain':>7} {'ratio':>6} "
            f"{'same text':>10}  acceptance by position"
        )
        for kind, row in sorted(kinds.items(), key=lambda item: item[0] == "all"):
            shares = " ".join(f"{share:.2f}" for share in row["acceptance_by_position"])
            yield (
                f"  {kind:12} {row['mean_acceptance_length']:11.2f} "
                f"{row['tokens_per_second']:9.1f} {row['plain_tokens_per_second']:7.1f} "
                f"{row['ratio']:6.2f} {row['same_text']:>5}/{row['prompts']:<4}  {shares}"
            )
    draft, verify = report["drafter_seconds"] * 1e3, report["verifier_seconds"] * 1e3
    yield (
        f"{report['verifier']}, {report['dtype']} on {report['device']}, "
        f"{report['num_threads']} threads, one request at a time, {report['max_tokens']} tokens"
    )
    yield (
        f"a round of {report['num_speculative_tokens']} drafts: {draft:.1f} ms, the pass over "
        f"them: {verify:.1f} ms, {draft / max(verify, 1e-9):.0%}"
    )
