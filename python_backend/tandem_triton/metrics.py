"""The engine's counters, load and latencies on the server's `/metrics`."""

from __future__ import annotations

import logging
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from tandem import Engine
from tandem.lookahead.diagnosis import ADVICE, Finding
from tandem.metrics import DrafterStats

logger = logging.getLogger("tandem")

_WINDOW_SECONDS = 60.0
_DESCRIPTIONS = {
    "alive_timestamp_seconds": "When the model's process last found that it works",
    "engine_steps_total": "Verifier passes",
    "prompt_tokens_total": "Prompt tokens of accepted requests",
    "generation_tokens_total": "Generated tokens",
    "num_preemptions_total": "Sequences freed and computed again because blocks ran out",
    "prefix_cache_queries_total": "Prompt tokens that were looked for in the prefix cache",
    "prefix_cache_hits_total": "Prompt tokens that the prefix cache had",
    "request_success_total": "Sequences that were generated to their end",
    "request_failure_total": "Requests that ended with an error",
    "num_requests_running": "Sequences in the continuous batch",
    "num_requests_waiting": "Sequences that the engine has queued",
    "kv_cache_blocks": "Blocks of the KV cache",
    "kv_cache_blocks_used": "Blocks of the KV cache that belong to a sequence",
    "prefix_cache_blocks_reused_total": "Blocks that the prefix cache had for a sequence",
    "prefix_cache_blocks_evicted_total": "Blocks of prefixes given away for other tokens",
    "spec_decode_num_drafts_total": "Rounds in which a drafter proposed tokens",
    "spec_decode_num_draft_tokens_total": "Draft tokens that were verified",
    "spec_decode_num_accepted_tokens_total": "Draft tokens that were accepted",
    "spec_decode_num_accepted_tokens_per_pos_total": "Accepted draft tokens by their place",
    "spec_decode_draft_acceptance_rate": "Share of draft tokens accepted, over the last minute",
    "spec_decode_mean_acceptance_length": "Tokens of a round with drafts, over the last minute",
    "spec_decode_mean_lookahead": "Draft tokens of a round, over the last minute",
    "spec_decode_low_gain": "Why speculation gains little, with the figure that shows it",
    "synthetic_acceptance": "1 if drafts are accepted by coin, for a benchmark",
    "time_to_first_token_seconds": "From arrival to the first token",
    "time_per_output_token_seconds": "Time for each token after the first",
    "request_queue_time_seconds": "From arrival to the first step",
    "e2e_request_latency_seconds": "From arrival to the end",
    "step_seconds_total": "Time of the steps by phase",
}
_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class _Snapshot(NamedTuple):
    """A drafter's counters at a moment."""

    at: float
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int


class MetricsExporter:
    """Shows the engine's counters, load and latencies on the server's `/metrics`.

    `observe` and `count` may be called from any thread and cost next to nothing; `update` sends
    everything, at a message to the server for each series that has changed.
    """

    def __init__(self, engine: Engine, args: dict[str, str]) -> None:
        self._engine = engine
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._shown: dict[tuple[str, ...], float] = {}
        self._events: SimpleQueue[tuple[str, float, dict[str, str]]] = SimpleQueue()
        self._windows: dict[str, deque[_Snapshot]] = {}
        self._seconds: dict[str, float] = {}  # of all steps, by phase
        self._off = False

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds a value to a histogram."""
        self._events.put((name, value, labels))

    def count(self, name: str, **labels: str) -> None:
        """Adds one to a counter."""
        self._events.put((name, 1, labels))

    def update(self, *, alive: bool) -> None:
        """Sends what has changed since the last time.

        Args:
            alive: whether the model works; a process that has died can't say so.
        """
        try:
            if alive:
                self._show("alive_timestamp_seconds", int(time.time()))
            self._send_events()
            self._show_engine()
            for name, stats in list(self._engine.drafter_stats.items()):
                self._show_drafter(name, stats)
            for name, findings in list(self._engine.monitor.findings.items()):
                self._show_findings(name, findings)
        except pb_utils.TritonModelException as error:
            if not self._off:
                logger.info("the server's metrics are off: %s", error)
            self._off = True

    def _send_events(self) -> None:
        while True:
            try:
                name, value, labels = self._events.get_nowait()
            except Empty:
                return
            if not self._off:
                metric = self._metric(name, labels)
                if name.endswith("_total"):
                    metric.increment(value)
                else:
                    metric.observe(value)

    def _show_engine(self) -> None:
        stats, load = self._engine.stats, self._engine.load
        self._show("engine_steps_total", stats.num_steps)
        while stats.phases:
            phase, seconds = stats.phases.popleft()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        for phase, seconds in self._seconds.items():
            self._show("step_seconds_total", seconds, phase=phase)
        self._show("prompt_tokens_total", stats.num_prompt_tokens)
        self._show("generation_tokens_total", stats.num_generation_tokens)
        self._show("prefix_cache_queries_total", stats.num_prefix_cache_queries)
        self._show("prefix_cache_hits_total", stats.num_prefix_cache_hits)
        self._show("num_preemptions_total", load.num_preemptions)
        if self._engine.config.synthetic_acceptance_rates:
            self._show("synthetic_acceptance", 1)
        self._show("num_requests_running", load.num_running)
        self._show("num_requests_waiting", load.num_waiting)
        for name, group in load.groups.items():
            self._show("kv_cache_blocks", group.num_blocks, group=name)
            self._show("kv_cache_blocks_used", group.num_used, group=name)
            self._show("prefix_cache_blocks_reused_total", group.num_reused, group=name)
            self._show("prefix_cache_blocks_evicted_total", group.num_evicted, group=name)

    def _show_drafter(self, name: str, stats: DrafterStats) -> None:
        self._show("spec_decode_num_drafts_total", stats.num_drafts, drafter=name)
        self._show("spec_decode_num_draft_tokens_total", stats.num_draft_tokens, drafter=name)
        self._show("spec_decode_num_accepted_tokens_total", stats.num_accepted_tokens, drafter=name)
        for position, count in sorted(dict(stats.num_accepted_by_position).items()):
            labels = {"drafter": name, "position": str(position)}
            self._show("spec_decode_num_accepted_tokens_per_pos_total", count, **labels)
        now = _Snapshot(
            time.monotonic(), stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens
        )
        window = self._windows.setdefault(name, deque([now]))
        if now.at - window[-1].at >= 1:
            window.append(now)
        while len(window) > 1 and now.at - window[0].at > _WINDOW_SECONDS:
            window.popleft()
        num_drafts = now.num_drafts - window[0].num_drafts
        if num_drafts:  # else what was shown last stays
            drafted = now.num_draft_tokens - window[0].num_draft_tokens
            accepted = now.num_accepted_tokens - window[0].num_accepted_tokens
            self._show("spec_decode_draft_acceptance_rate", accepted / drafted, drafter=name)
            length = 1 + accepted / num_drafts
            self._show("spec_decode_mean_acceptance_length", length, drafter=name)
            self._show("spec_decode_mean_lookahead", drafted / num_drafts, drafter=name)

    def _show_findings(self, name: str, findings: list[Finding]) -> None:
        """A reason that no longer holds is shown as -1."""
        figures = {finding.reason: finding.figure for finding in findings}
        for reason, advice in ADVICE.items():
            labels = {"drafter": name, "reason": reason.value, "advice": advice}
            if reason in figures or ("spec_decode_low_gain", *labels.values()) in self._shown:
                self._show("spec_decode_low_gain", figures.get(reason, -1), **labels)

    def _show(self, name: str, value: float, **labels: str) -> None:
        key = (name, *labels.values())
        if self._off or self._shown.get(key) == value:
            return
        metric = self._metric(name, labels)
        if name.endswith("_total"):
            metric.increment(value - self._shown.get(key, 0))
        else:
            metric.set(value)
        self._shown[key] = value

    def _metric(self, name: str, labels: dict[str, str]) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            kinds = pb_utils.MetricFamily
            is_histogram = name.endswith("_seconds") and "timestamp" not in name
            if name not in self._families:
                kind = kinds.COUNTER if name.endswith("_total") else kinds.GAUGE
                self._families[name] = kinds(
                    name=f"tandem:{name}",
                    description=_DESCRIPTIONS[name],
                    kind=kinds.HISTOGRAM if is_histogram else kind,
                )
            options = {"buckets": _BUCKETS} if is_histogram else {}
            self._metrics[key] = self._families[name].Metric(
                labels={**self._labels, **labels}, **options
            )
        return self._metrics[key]
