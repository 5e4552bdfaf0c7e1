"""Log probabilities as clients get them."""

from __future__ import annotations

from typing import Any

from tandem import Sequence, TokenLogprobs
from tandem.requests.token_bytes import TokenBytes, offsets_in

# JSON has no infinity; OpenAI and vLLM write this.
_LEAST = -9999.0

Entries = dict[str, dict[str, Any]]


def describe(found: TokenLogprobs, tokens: TokenBytes, offset: int) -> Entries:
    """As vLLM's backend writes them: token id -> log probability, rank and text.

    The chosen token comes first, and has its place in the text. One whose text doesn't say what
    its bytes are has them too.
    """
    entries = {
        token_id: {"logprob": max(value, _LEAST), "rank": rank}
        for rank, (token_id, value) in enumerate(found.top, start=1)
    }
    chosen = {
        "logprob": max(found.logprob, _LEAST),
        "rank": found.rank,
        "text_offset": offset,
    }
    entries = {found.token_id: chosen} | entries | {found.token_id: chosen}
    return {str(each): entry | _text(each, tokens) for each, entry in entries.items()}


def describe_prompt(sequence: Sequence, tokens: TokenBytes, text: str) -> list[Entries]:
    """The same for a prompt's tokens; nothing says how likely the first one is.

    Args:
        text: in which they have their places.
    """
    first, *others = sequence.token_ids[: sequence.num_prompt_tokens]
    start, *offsets = offsets_in(text, (first, *others), tokens)
    unknown = {"logprob": None, "rank": None, "text_offset": start}
    return [
        {str(first): unknown | _text(first, tokens)},
        *(
            describe(found, tokens, offset)
            for found, offset in zip(sequence.prompt_logprobs, offsets, strict=True)
        ),
    ]


def _text(token_id: int, tokens: TokenBytes) -> dict[str, Any]:
    own = tokens.of(token_id)
    text = own.decode(errors="replace")
    return {"decoded_token": text} | ({} if text.encode() == own else {"bytes": list(own)})
