"""The tokens at which a chat model ends its turn, by its tokenizer and its chat template."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

# What a chat template raises where it can't make anything of messages.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)
# Stands in the template for an answer.
_ANSWER = "tandem-answer"


@lru_cache(maxsize=8)
def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end of sequence, and the special token that the template has after answers.

    A model's configuration may name others: that of Qwen's base models, for example, only names
    the end of a document.
    """
    ids = {tokenizer.eos_token_id, _after_an_answer(tokenizer)}
    return frozenset(token_id for token_id in ids if token_id is not None)


def _after_an_answer(tokenizer: Any) -> int | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except REFUSALS:
        return None
    _, is_shown, behind = str(text).rpartition(_ANSWER)
    if not is_shown:
        return None
    token_ids: list[int] = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    if not token_ids:
        return None
    first = tokenizer.added_tokens_decoder.get(token_ids[0])
    return token_ids[0] if first is not None and first.special else None
