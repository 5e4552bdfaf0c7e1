"""Log probabilities as the OpenAI API and vLLM write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Of one token: its id, and those of the likeliest ones, -> what is known of them; its own first.
Entries = dict[str, dict[str, Any]]


def of_chat(tokens: Iterable[Entries], num_top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion.

    Args:
        num_top: how many of the likeliest tokens to report.
    """
    content = [
        {**_token(_own(each)), "top_logprobs": [_token(other) for other in _top(each, num_top)]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def of_completion(tokens: Sequence[Entries], num_top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion; see `of_chat`."""
    chosen = [_own(each) for each in tokens]
    tops = [
        # Nothing says how likely a prompt's first token is.
        None
        if own["logprob"] is None
        else {_name(other): other["logprob"] for other in _top(each, num_top)}
        for each, own in zip(tokens, chosen, strict=True)
    ]
    return {
        "tokens": [_name(own) for own in chosen],
        "token_logprobs": [own["logprob"] for own in chosen],
        "top_logprobs": tops,
        "text_offset": [own["text_offset"] for own in chosen],
    }


def of_prompt(tokens: Sequence[Entries], num_top: int) -> list[Entries | None]:
    """`prompt_logprobs`, as vLLM has them: null for the first token."""
    shown = ("logprob", "rank", "decoded_token")
    return [
        None
        if number == 0
        else {
            token_id: {name: entry[name] for name in shown}
            for token_id, entry in each.items()
            if entry is _own(each) or entry["rank"] <= num_top
        }
        for number, each in enumerate(tokens)
    ]


def _own(entries: Entries) -> dict[str, Any]:
    return next(iter(entries.values()))


def _top(entries: Entries, num_top: int) -> list[dict[str, Any]]:
    likeliest = [entry for entry in entries.values() if entry["rank"] <= num_top]
    return sorted(likeliest, key=lambda entry: int(entry["rank"]))


def _name(entry: dict[str, Any]) -> str:
    """A token's text, or its bytes, as OpenAI writes them, where they are a part of a character."""
    if "bytes" in entry:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
    return str(entry["decoded_token"])


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    text = entry["decoded_token"]
    own = entry.get("bytes") or list(text.encode())
    return {"token": text, "logprob": entry["logprob"], "bytes": own}
