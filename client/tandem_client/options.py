"""What a request may say, and its headers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class Options(TypedDict, total=False):
    """How to generate; the server's defaults hold for what isn't given.

    The keys are the server's (docs/requests.md). With `n` above 1, a stream's chunks belong to
    different sequences; `Client.generate` gives the first. `tools` go to the chat template.

    `request_id` and `traceparent` (of W3C trace context) turn up in the server's log. Requests with
    the same `prompt_cache_key` go to the same server behind Envoy; without one, so do those of the
    same conversation.
    """

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float]
    bad_words: Sequence[str]
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    seed: int
    n: int
    logprobs: int
    prompt_logprobs: int
    structured_outputs: Mapping[str, Any]
    return_token_ids: bool
    exclude_input_in_output: bool
    drafter: str
    num_speculative_tokens: int
    cache_salt: str
    tools: Sequence[Mapping[str, Any]]
    request_id: str
    traceparent: str
    prompt_cache_key: str


# Those that are about the request and not about its text.
ENVELOPE = ("request_id", "traceparent", "prompt_cache_key")


def make_metadata(prompt: Prompt, options: Options) -> list[tuple[str, str]]:
    """The headers of one request: its trace, and what a balancer picks the server by."""
    key = options.get("prompt_cache_key") or _conversation(prompt)
    named = {
        "traceparent": options.get("traceparent"),
        # A hash, since a header can't hold every text.
        "tandem-prefix": key and hashlib.sha256(key.encode(errors="replace")).hexdigest()[:32],
    }
    return [(name, value) for name, value in named.items() if value]


def _conversation(prompt: Prompt) -> str:
    """What all turns of a conversation have in common, and other conversations don't.

    The messages up to the user's first. Those before it alone, a system prompt that all share,
    would send everyone to one server.
    """
    if isinstance(prompt, str) or not all(isinstance(item, Mapping) for item in prompt):
        return ""
    roles = [cast("Mapping[str, Any]", item).get("role") for item in prompt]
    end = roles.index("user") + 1 if "user" in roles else 0
    return json.dumps(list(prompt)[:end]) if end else ""
