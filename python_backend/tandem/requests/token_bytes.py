"""The bytes that tokens stand for, and where tokens begin in a text.

A character may have several tokens, of which none has a text of its own.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class TokenBytes:
    """What a tokenizer's vocabulary says of its tokens: byte-level BPE, or pieces and byte tokens.

    Attributes:
        special: texts of the special tokens.
        strips_space: whether a text begins without the space that its first token begins with.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        self.special = {token_id: each.content for token_id, each in added.items() if each.special}
        self._tokenizer = tokenizer
        self._added = {token_id: each.content for token_id, each in added.items()}
        steps = {step["type"]: step for step in _steps(tokenizer)}
        self._is_byte_level = "ByteLevel" in steps
        self._space = _visible_space(steps)
        self.strips_space = (
            steps.get("Strip", {}).get("start", 0) > 0
            or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        )

    def of(self, token_id: int) -> bytes:
        """A token's bytes; none for one that the tokenizer doesn't have."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._is_byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if self._space is None:
            return str(self._tokenizer.decode([token_id])).encode()
        if (byte := _BYTE_TOKEN.fullmatch(piece)) is not None:
            return bytes.fromhex(byte[1])
        return str(piece).replace(self._space, " ").encode()


@lru_cache(maxsize=8)
def token_bytes(tokenizer: Any) -> TokenBytes:
    """That of a tokenizer, which is made once."""
    return TokenBytes(tokenizer)


def _steps(tokenizer: Any) -> list[dict[str, Any]]:
    """How its tokens become text; nothing where it's not one of the `tokenizers` package."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    return steps


def _visible_space(steps: dict[str, dict[str, Any]]) -> str | None:
    """What pieces have in place of a space; None if they aren't such pieces."""
    if "Metaspace" in steps:
        return str(steps["Metaspace"]["replacement"])
    replaced = steps.get("Replace", {})
    space = replaced.get("pattern", {}).get("String")
    return str(space) if space and replaced.get("content") == " " else None


class Offsets:
    """Where each token begins in the text of all, in characters.

    One that is only a part of a character begins where the character does.
    """

    def __init__(self, tokens: TokenBytes, start: int = 0) -> None:
        """Takes the place of the first one."""
        self.next = start
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokens.strips_space

    def place(self, token_id: int, *, hidden: bool = False) -> int:
        """The place of the next token, whose text may be left out."""
        here = self.next
        if not hidden:
            piece = self._tokens.of(token_id)
            if self._strips_space:
                piece, self._strips_space = piece.removeprefix(b" "), False
            self.next += len(self._decoder.decode(piece))
        return here


def offsets_in(text: str, token_ids: Iterable[int], tokens: TokenBytes) -> list[int]:
    """Where the tokens of a text begin in it, of which special ones may not be shown."""
    offsets, found = Offsets(tokens), []
    for token_id in token_ids:
        special = tokens.special.get(token_id)
        hidden = special is not None and not text.startswith(special, offsets.next)
        found.append(min(offsets.place(token_id, hidden=hidden), len(text)))
    return found
