"""The speculative loop: schedule, draft, verify, accept, commit."""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from threading import Lock

import torch

from tandem.acceptance.match import Verdict, match, toss
from tandem.acceptance.selection import Selection, select
from tandem.cache.block_pool import BlockPool
from tandem.calibration import Calibration, calibrate
from tandem.config import NO_DRAFTER, EngineConfig
from tandem.drafters.drafter import Drafter, DraftRequest
from tandem.drafters.loading import load_drafters
from tandem.errors import (
    InvalidRequestError,
    RequestCancelledError,
    TandemError,
    VerifierOutputError,
)
from tandem.lookahead.adaptive import AdaptiveLookahead, Lookahead
from tandem.lookahead.costs import CostModel
from tandem.lookahead.diagnosis import Finding, Monitor, diagnose
from tandem.metrics import HIGH_TEMPERATURE, DrafterStats, EngineLoad, EngineStats
from tandem.models.loading import load_verifier
from tandem.models.verifier import Verifier, VerifierOutput
from tandem.requests.admission import Admission
from tandem.requests.outputs import Delta, RequestOutput, TokenLogprobs
from tandem.requests.params import SamplingParams
from tandem.requests.sequence import Draft, FinishReason, ScheduledSequence, Sequence
from tandem.sampling.processors import token_logprobs
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
            batch_invariant=config.batch_invariant,
        )
        self.drafters: dict[str, Drafter] = load_drafters(config, loaded)
        self.scheduler = Scheduler(
            BlockPool(
                loaded.cache.num_blocks,
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
        self._lock = Lock()
        self.lookahead = self._make_lookahead()
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

    def _make_lookahead(self) -> Lookahead:
        if self.config.lookahead == "fixed" or not self.drafters:
            return Lookahead()
        calibration = Calibration(self.verifier, self.drafters, self.scheduler, self.accept)
        costs = CostModel(calibrate(self.config, calibration))
        return AdaptiveLookahead(costs, self.config.max_prefill_slowdown)

    def diagnose(self, drafter: str, stats: DrafterStats, batch_size: float = 1.0) -> list[Finding]:
        """What keeps a drafter from paying; see `tandem.lookahead.diagnosis.diagnose`."""
        if drafter not in self.drafters:
            return []
        return diagnose(
            stats, self.lookahead.costs, drafter, batch_size, self.config.max_lookaheads[drafter]
        )

    # --- requests

    def make_sequence(
        self,
        prompt: str | Items[int],
        params: SamplingParams | None = None,
        *,
        drafter: str | None = None,
        num_speculative_tokens: int | None = None,
        cache_salt: str = "",
    ) -> Sequence:
        """Checks one request and tokenizes its prompt; nothing is queued yet.

        Args:
            prompt: text, or token ids as they are.
            params: how tokens are chosen; `SamplingParams()` when not given.
            drafter: a configured name, or "none"; the configured default when not given.
            num_speculative_tokens: draft tokens a step at most, up to the drafter's own limit;
                0 switches speculation off.
            cache_salt: only requests with the same one share K/V in the prefix cache.

        Raises:
            InvalidRequestError: naming the argument and what is allowed.
        """
        return self._admission.make_sequence(
            prompt, params or SamplingParams(), drafter, num_speculative_tokens, cache_salt
        )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; the next step may run it."""
        with self._lock:
            self.scheduler.add(sequence)
            self.stats.num_prompt_tokens += sequence.num_prompt_tokens

    def cancel(self, sequence: Sequence, reason: TandemError | None = None) -> None:
        """Ends a sequence with the next step, whatever it is doing.

        Args:
            reason: the error that the sequence ends with, `RequestCancelledError` if not given.
        """
        sequence.cancellation = reason or RequestCancelledError("the request was cancelled")

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    @property
    def load(self) -> EngineLoad:
        """What the engine holds right now."""
        pool = self.scheduler.pool
        return EngineLoad(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_blocks=pool.num_blocks,
            num_blocks_used=pool.num_used,
            num_preemptions=self.scheduler.num_preemptions,
        )

    # --- the loop

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Advances the running sequences by one verifier pass; what it added to each."""
        ended = self._end_cancelled()
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
        with self.stats.time("commit"):
            self.lookahead.observe(batch, [v and v.num_accepted for v in verdicts], self.stats.last)
            deltas = self.commit(batch, output, verdicts)
        self.monitor.update(self.stats, self.drafter_stats)
        return ended + deltas

    def schedule(self) -> list[ScheduledSequence]:
        """Chooses who runs, with how many tokens and how many drafts at most."""
        with self._lock:
            num_decoding = sum(s.is_decoding for s in self.scheduler.running)
            num_prompts = len(self.scheduler.running) + len(self.scheduler.waiting) - num_decoding
            batch = self.scheduler.schedule(self.lookahead.prompt_limits(num_decoding, num_prompts))
        now = time.monotonic()
        for scheduled in batch:
            self._note_start(scheduled.sequence, now)
            grammar = scheduled.sequence.grammar
            if scheduled.num_draft_tokens > 0 and grammar is not None:
                scheduled.draft = Draft(grammar.forced()).first(scheduled.num_draft_tokens)
                scheduled.is_forced = bool(scheduled.draft.token_ids)
        self.lookahead.plan(batch)
        return batch

    def _note_start(self, sequence: Sequence, now: float) -> None:
        if sequence.started_at is not None:
            return
        sequence.started_at = now
        if self.config.enable_prefix_caching:
            self.stats.num_prefix_cache_queries += sequence.num_tokens
            self.stats.num_prefix_cache_hits += sequence.num_cached_tokens

    def draft(self, batch: list[ScheduledSequence]) -> None:
        """Lets each drafter guess for its sequences; a grammar that forces tokens needs none."""
        by_drafter: dict[str, list[ScheduledSequence]] = defaultdict(list)
        prompts: dict[str, list[ScheduledSequence]] = defaultdict(list)
        for scheduled in batch:
            if not scheduled.sequence.is_decoding and scheduled.sequence.max_lookahead > 0:
                prompts[scheduled.sequence.drafter].append(scheduled)
            if scheduled.num_draft_tokens > 0 and not scheduled.is_forced:
                by_drafter[scheduled.sequence.drafter].append(scheduled)
        for name, group in prompts.items():
            self.drafters[name].prefill(group)
        for name, group in by_drafter.items():
            requests = [DraftRequest(s.sequence, s.num_draft_tokens) for s in group]
            drafts = self.drafters[name].propose(requests, self.lookahead.goes_on)
            for scheduled, draft in zip(group, drafts, strict=True):
                assert len(draft.token_ids) <= scheduled.num_draft_tokens
                grammar = scheduled.sequence.grammar
                if grammar is not None:
                    draft = draft.first(grammar.num_valid(draft.token_ids))
                scheduled.draft = draft
        self.lookahead.choose(batch)

    def verify(self, batch: list[ScheduledSequence]) -> VerifierOutput:
        """One packed pass of the verifier over known tokens and drafts."""
        return self.verifier.forward(batch)

    def accept(
        self, batch: list[ScheduledSequence], output: VerifierOutput
    ) -> list[Verdict | None]:
        """Samples the verifier's token at each position and keeps the drafts that equal it.

        None stands for a sequence whose prompt isn't computed to its end yet, and an empty verdict
        for one whose logits are not numbers.
        """
        yielding = [s for s in batch if s.yields_token]
        if not yielding:
            return [None] * len(batch)
        selections = select(output, yielding, self.eos_token_ids)
        return [self._judge(s, selections[s]) if s in selections else None for s in batch]

    def _judge(self, scheduled: ScheduledSequence, selection: Selection) -> Verdict:
        if not selection.is_sound:
            return Verdict([], 0)
        verdict = self._match(scheduled, selection.token_ids)
        num_top = scheduled.sequence.params.logprobs
        if num_top is None:
            return verdict
        assert selection.logits is not None
        logprobs = token_logprobs(selection.logits, verdict.token_ids, num_top)
        return verdict._replace(logprobs=logprobs)

    def _match(self, scheduled: ScheduledSequence, token_ids: Items[int]) -> Verdict:
        rates = self.config.synthetic_acceptance_rates
        if rates and not scheduled.is_forced:
            sequence = scheduled.sequence
            coin = random.Random(hash((sequence.seed, sequence.num_tokens)))
            return toss(scheduled.draft_ids, token_ids, rates, coin)
        return match(scheduled.draft_ids, token_ids)

    def commit(
        self,
        batch: list[ScheduledSequence],
        output: VerifierOutput,
        verdicts: list[Verdict | None],
    ) -> list[Delta]:
        """Appends the new tokens, rolls rejected drafts back, and frees what has ended."""
        self.stats.num_steps += 1
        self.stats.num_scheduled_sequences += len(batch)
        deltas, row = [], 0
        for scheduled, verdict in zip(batch, verdicts, strict=True):
            sequence = scheduled.sequence
            sequence.num_computed += scheduled.num_tokens
            if verdict is None:
                continue
            deltas.append(self._advance(scheduled, verdict))
            drafter = self.drafters.get(sequence.drafter)
            if drafter is not None and not sequence.is_finished:
                drafter.observe(sequence, output.hidden[row + verdict.num_accepted])
            row += scheduled.num_rows
        with self._lock:
            for scheduled in batch:
                self._share(scheduled.sequence)
                if scheduled.sequence.is_finished:
                    self._release(scheduled.sequence)
                else:
                    self.scheduler.pool.shrink(scheduled.sequence, scheduled.sequence.num_tokens)
        return deltas

    def _advance(self, scheduled: ScheduledSequence, verdict: Verdict) -> Delta:
        sequence = scheduled.sequence
        if not verdict.token_ids:
            error = VerifierOutputError("the verifier's logits for this request are not numbers")
            sequence.finish(FinishReason.ERROR, error)
        appended = sequence.extend(verdict.token_ids, self.eos_token_ids, self.max_model_len)
        num_accepted = min(verdict.num_accepted, len(appended))
        # The K/V of accepted drafts are valid; those of rejected ones lie behind the length.
        sequence.num_computed += num_accepted
        sequence.num_verify_steps += 1
        sequence.num_drafts += bool(scheduled.draft_ids)
        sequence.num_draft_tokens += len(scheduled.draft_ids)
        sequence.num_accepted_tokens += num_accepted
        self._count(scheduled, verdict, num_accepted)
        self.stats.num_generation_tokens += len(appended)
        return Delta(
            sequence,
            appended,
            len(scheduled.draft_ids),
            num_accepted,
            verdict.logprobs[: len(appended)],
            sequence.finish_reason,
        )

    def _count(self, scheduled: ScheduledSequence, verdict: Verdict, num_accepted: int) -> None:
        sequence, num_drafted = scheduled.sequence, len(scheduled.draft_ids)
        stats = self.drafter_stats[sequence.drafter]
        drafter = self.drafters.get(sequence.drafter)
        if drafter is None or num_drafted == 0:
            return
        stats.add_round(num_drafted, num_accepted)
        if scheduled.is_forced:
            return
        parts = [stats.tried]
        if drafter.trained_length is not None and sequence.num_tokens > drafter.trained_length:
            parts.append(stats.tried_beyond_trained_length)
        if sequence.params.temperature >= HIGH_TEMPERATURE:
            parts.append(stats.tried_at_high_temperature)
        for part in parts:
            part.add(num_drafted, num_accepted)
        rejected = num_accepted < min(num_drafted, len(verdict.token_ids))
        if rejected and drafter.vocabulary is not None:
            right = verdict.token_ids[num_accepted]
            stats.num_outside_vocabulary += right not in drafter.vocabulary

    def _share(self, sequence: Sequence) -> None:
        """Lets later requests use what is committed, but not what gave no numbers."""
        if isinstance(sequence.error, VerifierOutputError):
            self.scheduler.pool.withdraw(sequence)
            return
        # A sequence that is never drafted for needs nothing of its drafter.
        drafter = self.drafters.get(sequence.drafter) if sequence.max_lookahead else None
        num_tokens = sequence.num_computed if drafter is None else drafter.num_cached(sequence)
        self.scheduler.pool.share(sequence, num_tokens)

    def _release(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.lookahead.forget(sequence)
        drafter = self.drafters.get(sequence.drafter)
        if drafter is not None:
            drafter.forget(sequence)

    def _end_cancelled(self) -> list[Delta]:
        with self._lock:
            live = [*self.scheduler.running, *self.scheduler.waiting]
            return [
                self._end(s, FinishReason.CANCELLED, s.cancellation) for s in live if s.cancellation
            ]

    def _end(self, sequence: Sequence, reason: FinishReason, error: TandemError) -> Delta:
        if sequence.is_finished:  # in a step that failed behind it
            sequence.finish_reason = None
        sequence.finish(reason, error)
        self._release(sequence)
        return Delta(sequence, [], finish_reason=reason)

    def abort(self, error: TandemError, *, waiting: bool = True) -> list[Delta]:
        """Ends every sequence with `error` and frees its cache; no step may be running.

        Args:
            waiting: whether sequences that have not begun end as well.
        """
        with self._lock:
            live = [*self.scheduler.running, *(self.scheduler.waiting if waiting else ())]
            return [self._end(sequence, FinishReason.ERROR, error) for sequence in live]

    def check_integrity(self) -> None:
        """Recounts the block pool; cheap enough to call whenever the engine is idle."""
        with self._lock:
            self.scheduler.check_integrity()

    # --- offline use

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

        Raises:
            InvalidRequestError: before anything runs, for the first prompt that can't be used.
        """
        each = params if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidRequestError(f"{len(prompts)} prompts, but {len(each)} params")
        sequences = [
            self.make_sequence(
                prompt, one, drafter=drafter, num_speculative_tokens=num_speculative_tokens
            )
            for prompt, one in zip(prompts, each, strict=True)
        ]
        return self._run(sequences)

    def _run(self, sequences: list[Sequence]) -> Iterator[RequestOutput]:
        logprobs: dict[Sequence, list[TokenLogprobs]] = defaultdict(list)
        for sequence in sequences:
            self.add(sequence)
        try:
            for sequence in sequences:
                while not sequence.is_finished:
                    for delta in self.step():
                        logprobs[delta.sequence] += delta.logprobs
                yield RequestOutput.of(sequence, logprobs.pop(sequence, []), self.tokenizer)
        finally:
            # A step that failed, or a caller that stopped early, leaves nothing behind.
            error = RequestCancelledError("the caller stopped")
            with self._lock:
                for sequence in sequences:
                    if not sequence.is_finished:
                        self._end(sequence, FinishReason.CANCELLED, error)
