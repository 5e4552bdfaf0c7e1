"""One of a request's sequences, and the outputs that its client gets of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence as Items
from functools import lru_cache
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from tandem import Delta, Sequence
from tandem.requests.options import RequestOptions
from tandem.requests.outputs import output_text, shown_ids
from tandem.requests.token_bytes import Offsets, token_bytes
from tandem_triton.logprobs import describe, describe_prompt
from tandem_triton.metrics import MetricsExporter


class Choice:
    """One of a request's sequences, and what of it hasn't been sent."""

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        tokenizer: Any,
        block_size: int,
        arrived_at: float,
        echo: str = "",
    ) -> None:
        """Starts with no tokens.

        Args:
            echo: text that comes before that of the tokens.
        """
        self._block_size = block_size
        self.index = index
        self.has_begun = False
        self.ended = False
        self.text = self._echo = echo
        self._length = len(echo)  # of the text so far
        self._sequence = sequence
        self._shown = output_text(tokenizer, sequence)
        self._tokens = token_bytes(tokenizer)
        self._offsets = Offsets(self._tokens, len(echo))
        self._arrived_at = arrived_at
        self._first_token_at: float | None = None
        self._last_token_at: float | None = None
        self._accepted_text_length = 0
        self._counts: Counter[str] = Counter()  # since the last response, by output
        self._acceptances: Counter[int] = Counter()  # rounds, by how many drafts were accepted
        self._token_ids: list[int] = []
        self._is_accepted_draft: list[bool] = []
        self._logprobs: list[dict[str, Any]] = []
        self._new_logprobs: list[float] = []
        self._cumulative_logprob = 0.0

    def add(self, news: Items[tuple[float, Delta]]) -> None:
        """Adds what steps brought, each with its time (`time.monotonic`)."""
        if self._first_token_at is None:
            self._first_token_at = news[0][0]
        self._last_token_at = news[-1][0]
        deltas = [delta for _, delta in news]
        self.ended = deltas[-1].finish_reason is not None
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        shown = shown_ids(self._sequence, token_ids) if self.ended else token_ids
        # Text of accepted drafts comes first in a response of one step; in others there is no such
        # place.
        split = 0 if self.text or len(deltas) > 1 else deltas[0].num_accepted_tokens
        accepted = self._shown.push(shown[:split])
        self._accepted_text_length = len(accepted)
        text = accepted + self._shown.push(shown[split:])
        if self.ended:
            text += self._shown.flush()
        self.text += text
        self._length += len(text)
        self._token_ids += token_ids
        for delta in deltas:
            self._count(delta)

    def _count(self, delta: Delta) -> None:
        num_tokens, num_accepted = len(delta.token_ids), delta.num_accepted_tokens
        self._counts["num_output_tokens"] += num_tokens
        if delta.num_draft_tokens > 0:
            self._counts["num_drafts"] += 1
            self._acceptances[num_accepted] += 1
        self._counts["num_draft_tokens"] += delta.num_draft_tokens
        self._counts["num_accepted_tokens"] += num_accepted
        self._is_accepted_draft += [place < num_accepted for place in range(num_tokens)]
        for logprob in delta.logprobs:
            self._cumulative_logprob += logprob.logprob
            self._new_logprobs.append(logprob.logprob)
            self._logprobs.append(describe(logprob, self._tokens, self._place(logprob.token_id)))

    def _place(self, token_id: int) -> int:
        """Where the next token begins in the text."""
        is_special = token_id in self._tokens.special
        hidden = is_special and self._sequence.params.skip_special_tokens
        return self._offsets.place(token_id, hidden=hidden)

    def take(self, options: RequestOptions) -> dict[str, Any]:
        """The outputs of a response, which are gone from here then."""
        sequence, is_first, self.has_begun = self._sequence, not self.has_begun, True
        reason = sequence.finish_reason if self.ended else None
        outputs: dict[str, Any] = {
            "text_output": self.text,
            "finish_reason": reason.value if reason else "",
            "sequence_index": self.index,
            "num_input_tokens": sequence.num_prompt_tokens,
            **{name: self._counts[name] for name in _COUNTS},
            "accepted_text_length": self._accepted_text_length,
        }
        if options.return_token_ids:
            outputs["output_ids"] = self._token_ids
            outputs["is_accepted_draft"] = self._is_accepted_draft
        if options.params.prompt_logprobs is not None and is_first:
            prompt = describe_prompt(sequence, self._tokens, self._echo)
            outputs["prompt_logprobs"] = json.dumps(prompt)
        if options.params.logprobs is not None:
            if self.ended:
                self._clip_offsets()
            outputs["logprobs"] = json.dumps(self._logprobs)
            outputs["output_log_probs"] = self._new_logprobs
            outputs["cumulative_logprob"] = self._cumulative_logprob
            outputs["cum_log_probs"] = self._cumulative_logprob
        if self.ended or options.return_perf_metrics:
            outputs |= self._totals()
        if options.return_perf_metrics:
            outputs |= self._perf_metrics()
        self.text, self._accepted_text_length = "", 0
        self._token_ids, self._is_accepted_draft = [], []
        self._logprobs, self._new_logprobs = [], []
        self._counts.clear()
        return outputs

    def _clip_offsets(self) -> None:
        """Tokens behind the end of the text, which a stop string may have cut, begin there."""
        for entries in self._logprobs:
            chosen = next(iter(entries.values()))
            chosen["text_offset"] = min(chosen["text_offset"], self._length)

    def observe(self, metrics: MetricsExporter) -> None:
        """Reports how long a sequence that has ended took."""
        sequence, now = self._sequence, time.monotonic()
        assert sequence.finish_reason is not None
        assert sequence.started_at is not None
        assert self._first_token_at is not None
        metrics.count(
            "request_success_total",
            finished_reason=sequence.finish_reason.value,
            drafter=sequence.drafter,
        )
        for name, start, end in (
            ("request_queue_time_seconds", self._arrived_at, sequence.started_at),
            ("time_to_first_token_seconds", self._arrived_at, self._first_token_at),
            ("e2e_request_latency_seconds", self._arrived_at, now),
        ):
            metrics.observe(name, end - start)
        if sequence.num_output_tokens > 1:
            seconds = (now - self._first_token_at) / (sequence.num_output_tokens - 1)
            metrics.observe("time_per_output_token_seconds", seconds)

    def _perf_metrics(self) -> dict[str, Any]:
        """TensorRT-LLM's figures; its clock is a steady one too."""
        sequence = self._sequence
        num_blocks = -(-sequence.num_tokens // self._block_size)
        num_reused = sequence.num_cached_tokens // self._block_size
        return {
            "kv_cache_alloc_new_blocks": num_blocks - num_reused,
            "kv_cache_reused_blocks": num_reused,
            "kv_cache_alloc_total_blocks": num_blocks,
            "arrival_time_ns": _nanoseconds(self._arrived_at),
            "first_scheduled_time_ns": _nanoseconds(sequence.started_at),
            "first_token_time_ns": _nanoseconds(self._first_token_at),
            "last_token_time_ns": _nanoseconds(self._last_token_at),
        }

    def _acceptance_histogram(self) -> list[int]:
        """Rounds with drafts in which j were accepted, for each j that there may be."""
        # What a grammar forces may be more than a drafter guesses.
        most = max([self._sequence.max_lookahead, *self._acceptances])
        return [self._acceptances[accepted] for accepted in range(most + 1)]

    def _totals(self) -> dict[str, Any]:
        sequence, now = self._sequence, time.monotonic()
        first_token_at = self._first_token_at or now
        return {
            "stop_reason": "" if sequence.stop_reason is None else str(sequence.stop_reason),
            "seed": sequence.seed,
            "num_cached_tokens": sequence.num_cached_tokens,
            "acceptance_rate": sequence.num_accepted_tokens / max(1, sequence.num_draft_tokens),
            "total_draft_tokens": sequence.num_draft_tokens,
            "total_accepted_draft_tokens": sequence.num_accepted_tokens,
            "acceptance_histogram": self._acceptance_histogram(),
            "time_to_first_token": first_token_at - self._arrived_at,
            "total_time": now - self._arrived_at,
        }


# TensorRT-LLM's, which its clients read with a dimension more: `[n, 1]`.
_COLUMNS = (
    "sequence_index",
    "acceptance_rate",
    "total_draft_tokens",
    "total_accepted_draft_tokens",
    "kv_cache_alloc_new_blocks",
    "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks",
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
)
_COUNTS = ("num_output_tokens", "num_drafts", "num_draft_tokens", "num_accepted_tokens")
# Outputs of every response with few different values.
_RECURRING = (
    "finish_reason",
    "sequence_index",
    "num_input_tokens",
    *_COUNTS,
    "accepted_text_length",
)
_DTYPES: dict[str, Any] = {
    "text_output": np.object_,
    "finish_reason": np.object_,
    "stop_reason": np.object_,
    "logprobs": np.object_,
    "prompt_logprobs": np.object_,
    "seed": np.uint64,
    "is_accepted_draft": bool,
    "arrival_time_ns": np.int64,
    "first_scheduled_time_ns": np.int64,
    "first_token_time_ns": np.int64,
    "last_token_time_ns": np.int64,
    **dict.fromkeys(
        (
            "output_log_probs",
            "cumulative_logprob",
            "cum_log_probs",
            "acceptance_rate",
            "time_to_first_token",
            "total_time",
        ),
        np.float32,
    ),
}


def output_tensor(name: str, values: list[Any]) -> Any:
    """An output with an element, or a list, for each sequence; lists are padded with -1."""
    return _kept_tensor(name, *values) if name in _RECURRING else _new_tensor(name, values)


@lru_cache(maxsize=1024)
def _kept_tensor(name: str, *values: Any) -> Any:
    """One that many responses have: it's made and put into shared memory once.

    Only one thread may send it: two that did so for the first time would both put it there.
    """
    return _new_tensor(name, list(values))


def _new_tensor(name: str, values: list[Any]) -> Any:
    dtype = _DTYPES.get(name, np.int32)
    if isinstance(values[0], list):
        width = max(map(len, values))
        values = [[*row, *[-1] * (width - len(row))] for row in values]
    elif dtype is np.object_:
        values = [value.encode() for value in values]
    array = np.array(values, dtype=dtype)
    return pb_utils.Tensor(name, array[:, np.newaxis] if name in _COLUMNS else array)


def _nanoseconds(seconds: float | None) -> int:
    assert seconds is not None
    return int(seconds * 1e9)
