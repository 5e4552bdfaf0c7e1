"""The speculative loop: schedule, draft, verify, accept, commit."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items

import torch

from tandem.acceptance.match import Verdict
from tandem.acceptance.scoring import score_prompts
from tandem.acceptance.verdicts import count_round
from tandem.cache.block_pool import BlockPool
from tandem.calibration import Calibration
from tandem.config import EngineConfig
from tandem.drafter_config import NO_DRAFTER
from tandem.drafters.drafter import Drafter
from tandem.drafters.loading import load_drafters
from tandem.drafters.rounds import force
from tandem.errors import RequestCancelledError, TandemError, VerifierOutputError
from tandem.kept_costs import make_lookahead
from tandem.lifecycle import Lifecycle
from tandem.lookahead.diagnosis import Finding, Monitor, diagnose
from tandem.metrics import DrafterStats, EngineLoad, EngineStats
from tandem.models.loading import load_verifier
from tandem.models.verifier import Verifier, VerifierOutput
from tandem.offline import params_of_each, run
from tandem.requests.admission import Admission
from tandem.requests.outputs import Delta, RequestOutput
from tandem.requests.params import SamplingParams
from tandem.requests.sequence import FinishReason, ScheduledSequence, Sequence
from tandem.rounds.making import make_round
from tandem.scheduler import Scheduler

logger = logging.getLogger("tandem")


class Engine:
    """Generates text with a verifier and drafters that share one KV cache.

    `add` and `cancel` may be called from any thread, `step` from one thread at a time.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Loads the models and allocates the cache.

        Raises:
            ConfigError, UnsupportedModelError, DrafterMismatchError: see `tandem.errors`.
        """
        started = time.monotonic()
        loaded = load_verifier(config)
        self.config = config
        self.tokenizer = loaded.tokenizer
        self.max_model_len = loaded.max_model_len
        self.eos_token_ids = loaded.eos_token_ids
        self.verifier = Verifier(
            loaded.model,
            loaded.head,
            loaded.cache,
            loaded.compiled,
        )
        self.drafters: dict[str, Drafter] = load_drafters(config, loaded)
        self.round = make_round(self.verifier, self.drafters, loaded, config)
        self.scheduler = Scheduler(
            BlockPool(
                loaded.cache.groups,
                config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            loaded.max_model_len,
        )
        self.stats = EngineStats()
        self.drafter_stats: defaultdict[str, DrafterStats] = defaultdict(DrafterStats)
        self._admission = Admission(
            loaded.tokenizer,
            loaded.model.config.get_text_config().vocab_size,
            loaded.max_model_len,
            loaded.eos_token_ids,
            config,
        )
        self.text_limits = self._admission.limits
        self.check_token_ids = self._admission.check_token_ids
        self._lifecycle = Lifecycle(self.scheduler, self.drafters, self.stats, self._forget)
        calibration = Calibration(self.verifier, self.drafters, self.scheduler, self.round)
        self.lookahead = make_lookahead(config, calibration)
        if config.synthetic_acceptance_rates:
            logger.warning(
                "synthetic_acceptance_rates is set: drafts are accepted by coin, so the text is "
                "not the verifier's; for benchmarks only"
            )
        self.monitor = Monitor(self.diagnose)
        logger.info(
            "loaded %s in %s on %s, drafters: %s; took %.1f s",
            config.verifier,
            str(loaded.model.dtype).removeprefix("torch."),
            loaded.model.device.type,
            ", ".join([NO_DRAFTER, *self.drafters]),
            time.monotonic() - started,
        )

    # --- the loop

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Advances the running sequences by one verifier pass; what it added to each."""
        ended = self._lifecycle.end_cancelled()
        with self.stats.time("schedule"):
            batch = self.schedule()
        if not batch:
            return ended
        with self.stats.time("draft"):
            self.draft(batch)
        with self.stats.time("verify"):
            output = self.verify(batch)
        with self.stats.time("accept"):
            verdicts = self.accept(batch, output)
        self.stats.last.update(self.round.seconds)
        with self.stats.time("commit"):
            self.lookahead.observe(batch, [v and v.num_accepted for v in verdicts], self.stats.last)
            deltas = self.commit(batch, output, verdicts)
        self.monitor.update(self.stats, self.drafter_stats)
        return ended + deltas

    def schedule(self) -> list[ScheduledSequence]:
        """Chooses who runs, with how many tokens and how many drafts at most."""
        batch = self._lifecycle.schedule(self.lookahead.prompt_limits)
        force(batch)
        self.lookahead.plan(batch)
        return batch

    def draft(self, batch: list[ScheduledSequence]) -> None:
        """Lets each drafter guess for its sequences, and keeps the guesses worth verifying."""
        self.round.draft(batch, self.lookahead)

    def verify(self, batch: list[ScheduledSequence]) -> VerifierOutput:
        """One packed pass of the verifier over known tokens and drafts."""
        return self.round.verify(batch)

    def accept(
        self, batch: list[ScheduledSequence], output: VerifierOutput
    ) -> list[Verdict | None]:
        """Samples the verifier's token at each position and keeps the drafts that equal it.

        None stands for a sequence whose prompt isn't computed to its end yet, and an empty verdict
        for one whose logits are not numbers.
        """
        return self.round.accept(batch, output)

    def commit(
        self,
        batch: list[ScheduledSequence],
        output: VerifierOutput,
        verdicts: list[Verdict | None],
    ) -> list[Delta]:
        """Appends the new tokens, rolls rejected drafts back, and frees what has ended."""
        self.stats.num_steps += 1
        self.stats.num_scheduled_sequences += len(batch)
        score_prompts(batch, output)
        deltas = []
        for scheduled, verdict in zip(batch, verdicts, strict=True):
            sequence = scheduled.sequence
            sequence.num_computed += scheduled.num_tokens
            if verdict is not None:
                deltas.append(self._advance(scheduled, verdict))
        self.round.observe(batch, output, verdicts)
        self._lifecycle.settle(batch)
        return deltas

    def _advance(self, scheduled: ScheduledSequence, verdict: Verdict) -> Delta:
        sequence, num_drafted = scheduled.sequence, len(scheduled.draft_ids)
        if not verdict.token_ids:
            error = VerifierOutputError("the verifier's logits for this request are not numbers")
            sequence.finish(FinishReason.ERROR, error)
        appended = sequence.extend(verdict.token_ids, self.eos_token_ids, self.max_model_len)
        num_accepted = min(verdict.num_accepted, len(appended))
        sequence.add_round(num_drafted, num_accepted)
        self.stats.num_generation_tokens += len(appended)
        drafter, stats = self.drafters.get(sequence.drafter), self.drafter_stats[sequence.drafter]
        if drafter is not None:
            count_round(stats, drafter, scheduled, verdict, num_accepted)
        logprobs, reason = verdict.logprobs[: len(appended)], sequence.finish_reason
        return Delta(sequence, appended, num_drafted, num_accepted, logprobs, reason)

    # --- what comes in and goes out

    def make_sequence(
        self,
        prompt: str | Items[int],
        params: SamplingParams | None = None,
        *,
        drafter: str | None = None,
        num_speculative_tokens: int | None = None,
        cache_salt: str = "",
    ) -> Sequence:
        """Checks one request and tokenizes its prompt; see `Admission.make_sequence`."""
        return self._admission.make_sequence(
            prompt, params or SamplingParams(), drafter, num_speculative_tokens, cache_salt
        )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; the next step may run it."""
        self._lifecycle.add(sequence)

    def cancel(self, sequence: Sequence, reason: TandemError | None = None) -> None:
        """Ends a sequence with the next step, whatever it is doing.

        Args:
            reason: the error that the sequence ends with, `RequestCancelledError` if not given.
        """
        sequence.cancellation = reason or RequestCancelledError("the request was cancelled")

    def abort(self, error: TandemError, *, waiting: bool = True) -> list[Delta]:
        """Ends every sequence with `error` and frees its cache; no step may be running.

        Args:
            waiting: whether sequences that have not begun end as well.
        """
        return self._lifecycle.abort(error, waiting=waiting)

    def generate(
        self,
        prompts: Items[str | Items[int]],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        drafter: str | None = None,
        num_speculative_tokens: int | None = None,
    ) -> Iterator[RequestOutput]:
        """Generates for all prompts in one continuous batch; yields in the prompts' order.

        Args:
            params: one for all prompts, or one for each.
            drafter, num_speculative_tokens: see `Admission.make_sequence`.

        Raises:
            InvalidRequestError: before anything runs, for the first prompt that can't be used.
        """
        sequences = [
            self.make_sequence(
                prompt, one, drafter=drafter, num_speculative_tokens=num_speculative_tokens
            )
            for prompt, one in zip(prompts, params_of_each(params, len(prompts)), strict=True)
        ]
        return run(sequences, self._lifecycle, self.step, self.tokenizer)

    def _forget(self, sequence: Sequence) -> None:
        self.lookahead.forget(sequence)
        if sequence.drafter in self.drafters:
            self.drafters[sequence.drafter].forget(sequence)

    # --- what it is doing

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    @property
    def load(self) -> EngineLoad:
        """What the engine holds right now."""
        return self.scheduler.load

    def diagnose(self, drafter: str, stats: DrafterStats, batch_size: float = 1.0) -> list[Finding]:
        """What keeps a drafter from paying; see `tandem.lookahead.diagnosis.diagnose`."""
        if drafter not in self.drafters:
            return []
        return diagnose(
            stats, self.lookahead.costs, drafter, batch_size, self.config.max_lookaheads[drafter]
        )

    def check_integrity(self) -> None:
        """Recounts the block pool; cheap enough to call whenever the engine is idle."""
        self._lifecycle.check_integrity()
