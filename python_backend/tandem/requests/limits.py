"""What of a text can be refused by its length alone, before it costs anything."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tandem.errors import InvalidRequestError, refusing
from tandem_options.json_size import check_json

# A tokenizer may have one token for any word that it doesn't know; longer ones are no words.
_MIN_TOKEN_BYTES = 64
# JSON may write a byte as \u0061.
_JSON_BYTES = 6


class TextLimits:
    """Bounds texts by the most bytes that `max_model_len` tokens can stand for.

    Attributes:
        max_bytes: of a prompt.
        max_model_len: of prompt and answer, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_model_len: int) -> None:
        """Finds the longest token; without a tokenizer there are no texts."""
        vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
        longest = max((len(token.replace("▁", " ").encode()) for token in vocabulary), default=0)
        self.max_bytes = max_model_len * max(longest, _MIN_TOKEN_BYTES)
        self.max_model_len = max_model_len

    def check_text(self, name: str, text: str) -> None:
        """Refuses a text that has too many tokens whatever they are.

        Raises:
            InvalidRequestError: naming the input, its length and the limit.
        """
        self._check(name, text, self.max_bytes)

    def check_json(self, name: str, text: str) -> None:
        """Refuses JSON that holds more text than that, or too many values; see `check_text`."""
        self._check(name, text, self.max_bytes * _JSON_BYTES)
        with refusing():
            check_json(name, text)

    def check_count(self, name: str, count: int) -> None:
        """Refuses more items than tokens, each of which is one token at least."""
        if count > self.max_model_len:
            raise InvalidRequestError(
                f"{name} is too long: this model's maximum context length is {self.max_model_len} "
                f"tokens (max_model_len). However, you sent {count} items"
            )

    def _check(self, name: str, text: str, max_bytes: int) -> None:
        # Characters first: they are counted already.
        size = len(text) if len(text) > max_bytes else len(text.encode("utf-8", "surrogatepass"))
        if size > max_bytes:
            raise InvalidRequestError(
                f"{name} is too long: this model's maximum context length is {self.max_model_len} "
                f"tokens (max_model_len). However, you sent {size} bytes, more than so many tokens "
                f"can stand for ({max_bytes}): send less"
            )
