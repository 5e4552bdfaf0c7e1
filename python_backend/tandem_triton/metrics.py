"""The engine's counters and load on the server's `/metrics`."""

from __future__ import annotations

import logging
from typing import Any

import triton_python_backend_utils as pb_utils

from tandem import Engine

logger = logging.getLogger("tandem")

_DESCRIPTIONS = {
    "engine_steps_total": "Verifier passes",
    "prompt_tokens_total": "Prompt tokens of accepted requests",
    "generation_tokens_total": "Generated tokens",
    "num_preemptions_total": "Sequences freed and computed again because blocks ran out",
    "num_requests_running": "Sequences in the continuous batch",
    "num_requests_waiting": "Sequences that the engine has queued",
    "kv_cache_blocks": "Blocks of the KV cache",
    "kv_cache_blocks_used": "Blocks of the KV cache that belong to a sequence",
    "spec_decode_num_drafts_total": "Rounds in which a drafter proposed tokens",
    "spec_decode_num_draft_tokens_total": "Draft tokens that were verified",
    "spec_decode_num_accepted_tokens_total": "Draft tokens that were accepted",
}


class MetricsExporter:
    """Shows the engine's counters and load on the server's `/metrics`."""

    def __init__(self, engine: Engine, args: dict[str, str]) -> None:
        self._engine = engine
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._shown: dict[tuple[str, str], float] = {}
        self._off = False

    def update(self) -> None:
        """Sends what has changed since the last time; each costs a message to the server."""
        stats, load = self._engine.stats, self._engine.load
        self._show("engine_steps_total", stats.num_steps)
        self._show("prompt_tokens_total", stats.num_prompt_tokens)
        self._show("generation_tokens_total", stats.num_generation_tokens)
        self._show("num_preemptions_total", load.num_preemptions)
        self._show("num_requests_running", load.num_running)
        self._show("num_requests_waiting", load.num_waiting)
        self._show("kv_cache_blocks", load.num_blocks)
        self._show("kv_cache_blocks_used", load.num_blocks_used)
        for name, drafter in list(self._engine.drafter_stats.items()):
            self._show("spec_decode_num_drafts_total", drafter.num_drafts, name)
            self._show("spec_decode_num_draft_tokens_total", drafter.num_draft_tokens, name)
            self._show("spec_decode_num_accepted_tokens_total", drafter.num_accepted_tokens, name)

    def _show(self, name: str, value: float, drafter: str = "") -> None:
        key = (name, drafter)
        if self._off or self._shown.get(key) == value:
            return
        try:
            metric = self._metrics.get(key) or self._make(name, drafter)
        except pb_utils.TritonModelException as error:
            logger.info("the server's metrics are off: %s", error)
            self._off = True
            return
        if name.endswith("_total"):
            metric.increment(value - self._shown.get(key, 0))
        else:
            metric.set(value)
        self._shown[key] = value

    def _make(self, name: str, drafter: str) -> Any:
        kinds = pb_utils.MetricFamily
        if name not in self._families:
            self._families[name] = kinds(
                name=f"tandem:{name}",
                description=_DESCRIPTIONS[name],
                kind=kinds.COUNTER if name.endswith("_total") else kinds.GAUGE,
            )
        labels = {**self._labels, "drafter": drafter} if drafter else self._labels
        metric = self._metrics[name, drafter] = self._families[name].Metric(labels=labels)
        return metric
