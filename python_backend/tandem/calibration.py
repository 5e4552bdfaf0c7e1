"""Measures what drafting and verifying cost here, in a short sweep when the engine loads.

The result is kept for each machine and configuration, in `$XDG_CACHE_HOME/tandem` or
`~/.cache/tandem`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

import torch
import transformers

from tandem.acceptance import Verdict
from tandem.config import EngineConfig
from tandem.costs import Costs, Curve, DraftCosts
from tandem.drafters import Drafter, DraftRequest
from tandem.machine import cache_directory, cpu_name
from tandem.params import SamplingParams
from tandem.scheduler import Scheduler
from tandem.sequence import Draft, ScheduledSequence, Sequence
from tandem.verifier import Verifier, VerifierOutput

logger = logging.getLogger("tandem")

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXT = 64
_REPETITIONS = 4
_GUESSES = 3
_NUM_WRITTEN = 8

T = TypeVar("T")
Accept = Callable[[list[ScheduledSequence], VerifierOutput], list[Verdict | None]]


def calibrate(config: EngineConfig, calibration: Calibration) -> Costs:
    """The costs that were measured here before, or those that are measured now."""
    path = _cache_path(config)
    try:
        costs = Costs.from_json(json.loads(path.read_text(encoding="utf-8")))
        logger.info("costs of drafting and verifying: from %s", path)
        return costs
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s can't be read, measuring again: %s", path, error)
    started = time.monotonic()
    costs = calibration.measure()
    logger.info(
        "measured costs of drafting and verifying in %.1f s: a pass over %s",
        time.monotonic() - started,
        ", ".join(f"{rows}: {1e3 * s:.1f} ms" for rows, s in costs.verify.points.items()),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another engine may be writing the same.
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(costs.to_json(), indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        logger.info("the costs can't be kept: %s", error)
    return costs


def _cache_path(config: EngineConfig) -> Path:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    facts = {
        "config": dataclasses.asdict(config),
        "device": device,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, transformers.__version__],
        "code": _code_hash(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_directory() / f"costs-{key[:16]}.json"


def _code_hash() -> str:
    """Changes with Tandem itself, which may have become faster."""
    files = sorted(p for p in Path(__file__).parent.rglob("*") if p.suffix in (".py", ".c", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class Calibration:
    """Runs passes and rounds over made-up sequences; the engine must be idle."""

    def __init__(
        self,
        verifier: Verifier,
        drafters: Mapping[str, Drafter],
        scheduler: Scheduler,
        accept: Accept,
    ) -> None:
        self._verifier = verifier
        self._drafters = drafters
        self._scheduler = scheduler
        self._accept = accept
        model = verifier.model
        self._device = model.device
        self._written: list[int] = []
        self._vocab_size: int = model.config.get_text_config().vocab_size

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Measures every cost; see `Costs`."""
        with self._sequences() as sequences:
            self._continue(sequences[0])
            verify, sequence = self._verify_costs(sequences)
            return Costs(
                verify=verify,
                sequence=sequence,
                prompt_token=self._prompt_token_cost(sequences[0]),
                draft={name: self._draft_costs(name, sequences) for name in self._drafters},
            )

    @contextmanager
    def _sequences(self) -> Iterator[list[Sequence]]:
        """Decoding sequences, as many as may run and find room."""
        scheduler = self._scheduler
        limit = scheduler.max_model_len
        context = min(_CONTEXT, limit // 2)
        sequences: list[Sequence] = []
        try:
            for index in range(scheduler.max_num_seqs):
                sequence = Sequence(
                    id=-1 - index,
                    token_ids=[(7 * i + index) % self._vocab_size for i in range(context)],
                    num_prompt_tokens=context,
                    params=SamplingParams(temperature=0.0),
                    seed=index,
                    drafter="",
                    max_lookahead=0,
                )
                # The first one is used for passes over many tokens.
                tokens = min(limit, context + _ROWS[-1]) if index == 0 else context + _GUESSES + 1
                if not scheduler.pool.grow(sequence, min(limit, tokens)):
                    break
                sequences.append(sequence)
                self._prefill(sequence)
            yield sequences
        finally:
            for sequence in sequences:
                scheduler.pool.shrink(sequence, 0)
                for drafter in self._drafters.values():
                    drafter.forget(sequence)

    def _prefill(self, sequence: Sequence) -> None:
        num_tokens = sequence.num_tokens
        step = self._scheduler.max_num_batched_tokens
        while sequence.num_computed < num_tokens:
            part = min(step, sequence.num_uncomputed)
            scheduled = ScheduledSequence(sequence, part, 0)
            for drafter in self._drafters.values():
                drafter.prefill([scheduled])
            output = self._verifier.forward([scheduled])
            sequence.num_computed += part
        # The verifier's own: behind others it may be in states that no text leads to.
        sequence.token_ids.append(self._own([scheduled], output)[0])
        for drafter in self._drafters.values():
            drafter.observe(sequence, output.hidden[-1])

    def _continue(self, sequence: Sequence) -> None:
        """Writes a few tokens, which are drafts of the passes that are measured."""
        for _ in range(_NUM_WRITTEN):
            batch = [ScheduledSequence(sequence, 1, len(self._written), Draft(self._written))]
            self._written = self._own(batch, self._verifier.forward(batch))

    def _own(self, batch: list[ScheduledSequence], output: VerifierOutput) -> list[int]:
        """The verifier's tokens for one sequence; any if there are none."""
        [verdict] = self._accept(batch, output)
        return verdict.token_ids if verdict and verdict.token_ids else [1]

    def _time(
        self, runs: Mapping[T, Callable[[], object]], before: Callable[[], object] = int
    ) -> dict[T, float]:
        """The shortest of a few times of each run, each behind `before`.

        All runs take turns, so that a slow while of the machine can't bend a curve.
        """
        seconds: dict[T, list[float]] = {key: [] for key in runs}
        for _ in range(1 + _REPETITIONS):
            for key, run in runs.items():
                before()
                started = time.perf_counter()
                run()
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                seconds[key].append(time.perf_counter() - started)
        # The first only warms up.
        return {key: min(each[1:]) for key, each in seconds.items()}

    def _pass(self, sequences: list[Sequence], num_drafts: int) -> Callable[[], object]:
        draft = Draft(list(islice(cycle(self._written), num_drafts)))
        batch = [ScheduledSequence(s, 1, num_drafts, draft) for s in sequences]
        return lambda: self._accept(batch, self._verifier.forward(batch))

    def _verify_costs(self, sequences: list[Sequence]) -> tuple[Curve, float]:
        """A pass by its rows, for one sequence, and what each further sequence adds."""
        first = sequences[0]
        room = len(first.block_table) * self._scheduler.pool.block_size - first.num_computed
        limit = min(room, self._scheduler.max_num_batched_tokens)
        count = min(8, len(sequences))
        runs = {(1, rows): self._pass([first], rows - 1) for rows in _ROWS if rows <= limit}
        runs[count, count] = self._pass(sequences[:count], 0)
        seconds = self._time(runs)
        together = seconds.pop((count, count)) if count > 1 else 0.0
        verify = Curve({rows: each for (_, rows), each in seconds.items()})
        return verify, max(0.0, together - verify(count)) / max(1, count - 1)

    def _prompt_token_cost(self, sequence: Sequence) -> float:
        """From passes over a half and the whole of a prompt."""
        known = sequence.num_computed

        def run(count: int) -> None:
            sequence.num_computed = known - count
            self._verifier.forward([ScheduledSequence(sequence, count, 0)])  # yields no token

        seconds = self._time({count: partial(run, count) for count in (known // 2, known)})
        sequence.num_computed = known
        return max(0.0, seconds[known] - seconds[known // 2]) / (known - known // 2)

    def _draft_costs(self, name: str, sequences: list[Sequence]) -> DraftCosts:
        counts = [c for c in _SEQUENCES if c <= len(sequences)]
        runs = {
            (count, guesses): self._round(name, sequences[:count], guesses)
            for count in counts
            for guesses in (1, _GUESSES)
        }
        # A pass leaves nothing of the drafter's weights in the processor's caches.
        step = [ScheduledSequence(sequences[0], 1, 0)]
        seconds = self._time(runs, lambda: self._verifier.forward(step))
        begin, guess = {}, {}
        for count in counts:
            few, many = seconds[count, 1], seconds[count, _GUESSES]
            guess[count] = max(0.0, many - few) / (_GUESSES - 1)
            begin[count] = max(0.0, few - guess[count])
        return DraftCosts(Curve(begin), Curve(guess))

    def _round(self, name: str, sequences: list[Sequence], guesses: int) -> Callable[[], object]:
        requests = [DraftRequest(sequence, guesses) for sequence in sequences]
        return lambda: self._drafters[name].propose(requests)
