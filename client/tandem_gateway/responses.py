"""Tandem's chunks as the objects of the OpenAI API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem_client import Chunk
from tandem_gateway import logprobs
from tandem_gateway.tools.message import Message
from tandem_gateway.tools.plan import Plan

Kind = Literal["chat.completion", "text_completion"]


@dataclass
class Usage:
    """Counts over all of a request's chunks."""

    num_input_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    num_cached_tokens: dict[int, int] = field(default_factory=dict)
    num_output_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    acceptance_histograms: list[Sequence[int]] = field(default_factory=list)  # of each answer

    def add(self, prompt: int, chunk: Chunk) -> None:
        """Counts a chunk of the answer to prompt number `prompt`."""
        self.num_input_tokens[prompt] = chunk.num_input_tokens
        if chunk.num_cached_tokens is not None:
            # A sequence that was preempted may have had output of its own there too.
            cached = min(chunk.num_cached_tokens, chunk.num_input_tokens)
            self.num_cached_tokens[prompt] = cached
        if chunk.acceptance_histogram is not None:
            self.acceptance_histograms.append(chunk.acceptance_histogram)
        for name in (
            "num_output_tokens",
            "num_drafts",
            "num_draft_tokens",
            "num_accepted_tokens",
        ):
            setattr(self, name, getattr(self, name) + getattr(chunk, name))

    def counts(self) -> dict[str, Any]:
        """OpenAI's `usage` so far."""
        prompt_tokens = sum(self.num_input_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": prompt_tokens + self.num_output_tokens,
        }

    def to_json(self) -> dict[str, Any]:
        """OpenAI's `usage`, and what speculation did."""
        return self.counts() | {
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_tokens.values())},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.num_accepted_tokens,
                "rejected_prediction_tokens": self.num_draft_tokens - self.num_accepted_tokens,
            },
            "speculation": {
                "num_drafts": self.num_drafts,
                "num_draft_tokens": self.num_draft_tokens,
                "num_accepted_tokens": self.num_accepted_tokens,
                "acceptance_rate": self._acceptance_rate,
                "mean_acceptance_length": self._mean_acceptance_length,
            },
        }

    def metrics(self) -> dict[str, Any]:
        """`metrics.speculative_decoding`, as vLLM writes it and aiperf reads it.

        Empty unless it is that of a single answer, and where nothing may be drafted.

        Source: vLLM's pull request 48915; `VLLMSpecDecodeAdapter` of aiperf, which refuses counts
        that contradict one another.
        """
        if len(self.acceptance_histograms) != 1 or len(self.acceptance_histograms[0]) < 2:
            return {}
        (histogram,) = self.acceptance_histograms
        return {
            "metrics": {
                "speculative_decoding": {
                    "mean_acceptance_length": self._mean_acceptance_length,
                    "draft_acceptance_rate": self._acceptance_rate,
                    "acceptance_histogram": list(histogram),
                    "num_spec_steps": self.num_drafts,
                    "num_accepted_draft_tokens": self.num_accepted_tokens,
                    "num_draft_tokens": self.num_draft_tokens,
                    "num_spec_tokens": len(histogram) - 1,
                }
            }
        }

    @property
    def _acceptance_rate(self) -> float:
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    @property
    def _mean_acceptance_length(self) -> float:
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)


class Writer:
    """Writes the objects of one answer, all under one id."""

    def __init__(
        self,
        kind: Kind,
        model: str,
        num_top: int | None,
        *,
        num_top_of_prompt: int | None = None,
        echoes: bool = False,
        request_id: str | None = None,
        with_token_ids: bool = False,
        plan: Plan | None = None,
    ) -> None:
        """Starts an answer.

        Args:
            num_top: how many of the likeliest tokens to report; None for no log probabilities.
            num_top_of_prompt: the same for `prompt_logprobs`.
            echoes: whether the text begins with the prompt.
            request_id: what the id ends with; drawn when None.
            with_token_ids: whether to report tokens by their ids.
            plan: how a chat's texts are read, if they hold more than content.
        """
        self._plan = plan
        self._messages: dict[int, Message] = {}  # by choice
        self._num_top = num_top
        self._with_token_ids = with_token_ids
        self._num_top_of_prompt = num_top_of_prompt
        self._echoes = echoes
        self._is_chat = kind == "chat.completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self.id = f"{prefix}-{request_id or secrets.token_hex(12)}"
        self._head = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """The object of a stream for one chunk of choice `index`."""
        choice: dict[str, Any] = {"index": index, "finish_reason": chunk.finish_reason}
        if self._is_chat:
            message = self._message(index)
            choice["delta"] = message.delta(chunk.text, chunk.finish_reason)
            choice["finish_reason"] = message.finish_reason
        else:
            choice["text"] = chunk.text
        choice["logprobs"] = self._logprobs([chunk])
        choice |= self._prompt_logprobs([chunk])
        if self._plan is None:
            choice["accepted_text_length"] = chunk.accepted_text_length
        if self._with_token_ids:
            choice["token_ids"] = list(chunk.token_ids)
        return self._stream_head() | {"choices": [choice]}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last object of a stream that was asked for it."""
        return self._stream_head() | {"choices": [], "usage": usage.to_json()} | usage.metrics()

    def whole(self, answers: dict[int, list[Chunk]], usage: Usage) -> dict[str, Any]:
        """The object of an answer that isn't streamed; `answers` are chunks by choice."""
        choices = []
        for index, chunks in sorted(answers.items()):
            text = "".join(chunk.text for chunk in chunks)
            choice: dict[str, Any] = {
                "index": index,
                "finish_reason": chunks[-1].finish_reason,
                "stop_reason": chunks[-1].stop_reason,
                "seed": chunks[-1].seed,
                "logprobs": self._logprobs(chunks),
            }
            if self._is_chat:
                message = self._message(index)
                choice["message"] = message.whole(text, chunks[-1].finish_reason)
                choice["finish_reason"] = message.finish_reason
            else:
                choice["text"] = text
            choice |= self._prompt_logprobs(chunks)
            if self._with_token_ids:
                choice["token_ids"] = [each for chunk in chunks for each in chunk.token_ids]
            choices.append(choice)
        return self._head | {"choices": choices, "usage": usage.to_json()} | usage.metrics()

    def _message(self, index: int) -> Message:
        return self._messages.setdefault(index, Message(self._plan))

    def _stream_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._is_chat else {})

    def _logprobs(self, chunks: Sequence[Chunk]) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        tokens = [token for chunk in chunks for token in chunk.logprobs]
        if self._is_chat:
            return logprobs.of_chat(tokens, self._num_top)
        prompt = [token for chunk in chunks for token in chunk.prompt_logprobs]
        return logprobs.of_completion([*prompt, *tokens] if self._echoes else tokens, self._num_top)

    def _prompt_logprobs(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """Those of the first chunk, if they were asked for by themselves."""
        if self._num_top_of_prompt is None or not chunks[0].prompt_logprobs:
            return {}
        found = logprobs.of_prompt(chunks[0].prompt_logprobs, self._num_top_of_prompt)
        return {"prompt_logprobs": found}
