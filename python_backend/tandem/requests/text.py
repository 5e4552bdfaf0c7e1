"""From tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Any, Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """The text of these tokens."""


class Detokenizer:
    """Turns one sequence's tokens into text without ever changing what it has emitted.

    A token's text can depend on the one before it, so the last emitted tokens are decoded along
    with the new ones; text is held back while it ends in half a character.

    Source: the two offsets of text-generation-inference and vLLM.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._context = 0  # token_ids[_context:_emitted] are decoded again as context
        self._emitted = 0  # the text of token_ids[:_emitted] is out

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        token_ids = list(token_ids)
        self._token_ids += token_ids
        text = self._take(final=False)
        if text or len(token_ids) < 2:
            return text
        # The last of them ends within a character, but not those before it.
        del self._token_ids[-len(token_ids) :]
        return "".join(self.push([token_id]) for token_id in token_ids)

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


class OutputText:
    """One sequence's text as a client may see it: up to a stop string, which is never shown.

    Text is held back while it could be the beginning of a stop string. Stop strings are looked for
    in text, not in tokens, so it doesn't matter how the tokenizer cuts them; what comes out depends
    on the tokens alone, not on how many came at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Items[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """Starts with no text.

        Args:
            stop: strings that end the text.
            min_tokens: text of the tokens before this one is not searched.
            include_stop: whether the stop string is shown.
        """
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._num_tokens = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; nothing once a stop string was found."""
        if not self._stop:
            return self._detokenizer.push(token_ids)
        return "".join(self._push(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """What is left at the end."""
        if self.matched is not None:
            return ""
        return self._search(self._detokenizer.flush(), final=True)

    def _push(self, token_id: int) -> str:
        if self.matched is not None:
            return ""
        self._num_tokens += 1
        text = self._detokenizer.push([token_id])
        return text if self._num_tokens < self._min_tokens else self._search(text, final=False)

    def _search(self, text: str, *, final: bool) -> str:
        text = self._held + text
        found = [(text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            start, self.matched = min(found, key=lambda match: (match[0], len(match[1])))
            self._held = ""
            return text[: start + len(self.matched) if self._include_stop else start]
        kept = 0 if final else self._num_held(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
