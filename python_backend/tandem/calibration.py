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
from pathlib import Path
from statistics import median

import torch
import transformers

from tandem.config import EngineConfig
from tandem.costs import Costs, Curve, DraftCosts
from tandem.drafters import Drafter, DraftRequest
from tandem.params import SamplingParams
from tandem.scheduler import Scheduler
from tandem.sequence import Draft, ScheduledSequence, Sequence
from tandem.verifier import Verifier, VerifierOutput

logger = logging.getLogger("tandem")

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXT = 64
_REPETITIONS = 3
_GUESSES = 3

Accept = Callable[[list[ScheduledSequence], VerifierOutput], object]


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
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, transformers.__version__],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tandem" / f"costs-{key[:16]}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("model name")), platform.machine())


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
        self._vocab_size: int = model.config.get_text_config().vocab_size

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Measures every cost; see `Costs`."""
        with self._sequences() as sequences:
            verify = self._verify_costs(sequences[0])
            return Costs(
                verify=Curve(verify),
                sequence=self._sequence_cost(sequences, verify),
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
        sequence.token_ids.append(1)
        for drafter in self._drafters.values():
            drafter.observe(sequence, output.hidden[-1])

    def _time(self, run: Callable[[], object], before: Callable[[], object] = int) -> float:
        """The median of a few runs, each behind `before`; the first only warms up."""
        seconds = []
        for _ in range(1 + _REPETITIONS):
            before()
            started = time.perf_counter()
            run()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.perf_counter() - started)
        return median(seconds[1:])

    def _pass(self, sequences: list[Sequence], num_drafts: int) -> float:
        draft = Draft([1 + i % 3 for i in range(num_drafts)])
        batch = [ScheduledSequence(s, 1, num_drafts, draft) for s in sequences]
        return self._time(lambda: self._accept(batch, self._verifier.forward(batch)))

    def _verify_costs(self, sequence: Sequence) -> dict[int, float]:
        room = len(sequence.block_table) * self._scheduler.pool.block_size - sequence.num_computed
        limit = min(room, self._scheduler.max_num_batched_tokens)
        return {rows: self._pass([sequence], rows - 1) for rows in _ROWS if rows <= limit}

    def _sequence_cost(self, sequences: list[Sequence], verify: dict[int, float]) -> float:
        count = min(8, len(sequences))
        if count == 1:
            return 0.0
        together = self._pass(sequences[:count], 0)
        return max(0.0, together - Curve(verify)(count)) / (count - 1)

    def _prompt_token_cost(self, sequence: Sequence) -> float:
        """From passes over a half and the whole of a prompt."""
        known = sequence.num_computed
        seconds = {}
        for count in (known // 2, known):
            sequence.num_computed = known - count
            part = ScheduledSequence(sequence, count, 0)  # yields no token
            seconds[count] = self._time(partial(self._verifier.forward, [part]))
        sequence.num_computed = known
        return max(0.0, seconds[known] - seconds[known // 2]) / (known - known // 2)

    def _draft_costs(self, name: str, sequences: list[Sequence]) -> DraftCosts:
        begin, guess = {}, {}
        for count in (c for c in _SEQUENCES if c <= len(sequences)):
            few, many = (self._round(name, sequences[:count], n) for n in (1, _GUESSES))
            guess[count] = max(0.0, many - few) / (_GUESSES - 1)
            begin[count] = max(0.0, few - guess[count])
        return DraftCosts(Curve(begin), Curve(guess))

    def _round(self, name: str, sequences: list[Sequence], num_guesses: int) -> float:
        requests = [DraftRequest(sequence, num_guesses) for sequence in sequences]
        # A pass leaves nothing of the drafter's weights in the processor's caches.
        step = [ScheduledSequence(sequences[0], 1, 0)]
        return self._time(
            lambda: self._drafters[name].propose(requests), lambda: self._verifier.forward(step)
        )
