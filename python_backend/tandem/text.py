"""From tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns one sequence's tokens into text without ever changing what it has emitted.

    A token's text can depend on the one before it, so the last emitted tokens are decoded along
    with the new ones; text is held back while it ends in half a character.

    Source: the two offsets of text-generation-inference and vLLM.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._context = 0  # token_ids[_context:_emitted] are decoded again as context
        self._emitted = 0  # the text of token_ids[:_emitted] is out

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        text = ""
        for token_id in token_ids:
            self._token_ids.append(token_id)
            text += self._take(final=False)
        return text

    def flush(self) -> str:
        """What is left at the end; half a character comes out as U+FFFD."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        known = self._decode(self._token_ids[self._context : self._emitted])
        whole = self._decode(self._token_ids[self._context :])
        if len(whole) <= len(known) or (whole.endswith(_INCOMPLETE) and not final):
            return ""
        self._context, self._emitted = self._emitted, len(self._token_ids)
        return whole[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text
