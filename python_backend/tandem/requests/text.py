"""From tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from functools import lru_cache
from typing import Any, Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_FIRST_MARK = 0xD800


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens that stand beside the vocabulary, special ones among them."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """The text of these tokens."""

    def __hash__(self) -> int: ...


class Detokenizer:
    """Turns one sequence's tokens into text without ever changing what it has emitted.

    A token's text can depend on the one before it, so the last emitted tokens are decoded along
    with the new ones; text is held back while it ends in half a character.

    Source: the two offsets of text-generation-inference and vLLM.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        # They would be decoded again with each token that follows.
        self._skipped = _special_tokens(tokenizer).keys() if skip_special_tokens else ()
        self._token_ids: list[int] = []
        self._context = 0  # token_ids[_context:_emitted] are decoded again as context
        self._emitted = 0  # the text of token_ids[:_emitted] is out

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        token_ids = [token_id for token_id in token_ids if token_id not in self._skipped]
        self._token_ids += token_ids
        text = self._take(final=False)
        if text or len(token_ids) < 2:
            return text
        # The last of them ends within a character, but not those before it.
        del self._token_ids[-len(token_ids) :]
        return "".join(self.push([token_id]) for token_id in token_ids)

    def flush(self) -> str:
        """What is left at the end, but for half a character."""
        return self._take(final=True).rstrip(_INCOMPLETE)

    def _take(self, *, final: bool) -> str:
        known = self._decode(self._token_ids[self._context : self._emitted])
        whole = self._decode(self._token_ids[self._context :])
        if len(whole) <= len(known) or (whole.endswith(_INCOMPLETE) and not final):
            return ""
        self._context, self._emitted = self._emitted, len(self._token_ids)
        return whole[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text


class OutputText:
    """One sequence's text as a client may see it: up to a stop string, which is never shown.

    Text is held back while it could be the beginning of a stop string. Stop strings are looked for
    in text, not in tokens, so it doesn't matter how the tokenizer cuts them; what comes out depends
    on the tokens alone, not on how many came at once. A special token that isn't shown is still
    found by a stop string that holds it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Items[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """Starts with no text.

        Args:
            stop: strings that end the text.
            min_tokens: a stop string that is complete before this many ends nothing.
            include_stop: whether the stop string is shown.
            skip_special_tokens: whether special tokens are left out of what is shown.
        """
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        # A special token's text -> the character that stands for it unseen.
        self._marks = _mark_special_tokens(tokenizer, stop) if skip_special_tokens else {}
        self._special = _special_tokens(tokenizer) if self._marks else {}
        self._unseen = dict.fromkeys(map(ord, self._marks.values()))
        # As it is looked for -> as it was given.
        self._stops = {each: each for each in stop} | {self._marked(each): each for each in stop}
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._num_tokens = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; nothing once a stop string was found."""
        if not self._stops:
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
        mark = self._marks.get(self._special.get(token_id, ""), "")
        text = self._detokenizer.push([token_id]) + mark
        return self._search(text, final=False)

    def _search(self, text: str, *, final: bool) -> str:
        known = len(self._held)  # what ends within came too early
        text = self._held + text
        starts = {stop: text.find(stop, max(0, known + 1 - len(stop))) for stop in self._stops}
        found = [(start, len(stop), stop) for stop, start in starts.items() if start >= 0]
        if found and self._num_tokens >= self._min_tokens:
            start, _, stop = min(found)
            self.matched, self._held = self._stops[stop], ""
            return self._shown(text[:start]) + (self.matched if self._include_stop else "")
        kept = 0 if final else self._num_held(text)
        self._held = text[len(text) - kept :]
        return self._shown(text[: len(text) - kept])

    def _marked(self, stop: str) -> str:
        for text in sorted(self._marks, key=len, reverse=True):
            stop = stop.replace(text, self._marks[text])
        return stop

    def _shown(self, text: str) -> str:
        return text.translate(self._unseen) if self._unseen else text

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _mark_special_tokens(tokenizer: Tokenizer, stop: Items[str]) -> dict[str, str]:
    """For each special token that a stop string holds a character that no text has.

    Half a surrogate pair: nothing that is decoded from UTF-8 has one.
    """
    if not stop:
        return {}
    texts = "\n".join(stop)
    held = [text for text in set(_special_tokens(tokenizer).values()) if text in texts]
    return {text: chr(_FIRST_MARK + number) for number, text in enumerate(sorted(held))}


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder
    return {token_id: token.content for token_id, token in added.items() if token.special}
