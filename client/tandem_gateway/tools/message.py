"""One answer of a chat as OpenAI's message, whole or in deltas."""

from __future__ import annotations

import secrets
from typing import Any

from tandem_gateway.tools.plan import Plan
from tandem_gateway.tools.source import Piece


class Message:
    """Makes the message of one answer from its text.

    Attributes:
        finish_reason: why it ended, once it has: "tool_calls" if the model stopped behind calls.
    """

    def __init__(self, plan: Plan | None) -> None:
        """Starts a message.

        Args:
            plan: how its text is read; None if it is content as it is.
        """
        self._reader = plan.reader() if plan else None
        self._num_calls = 0
        self._has_begun = False
        self.finish_reason: str | None = None

    def delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """What some more text adds; the last comes with a reason."""
        delta: dict[str, Any] = {}
        if not self._has_begun:
            delta["role"] = "assistant"
            self._has_begun = True
        if self._reader is None:
            delta["content"] = text
            self.finish_reason = finish_reason
            return delta
        for piece in self._reader.feed(text, is_last=finish_reason is not None):
            self._add(delta, piece)
        has_called = finish_reason == "stop" and self._num_calls > 0
        self.finish_reason = "tool_calls" if has_called else finish_reason
        return delta

    def whole(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """The message of a text that is complete."""
        delta = self.delta(text, finish_reason)
        calls = delta.get("tool_calls", [])
        for call in calls:
            del call["index"]
        content = delta.get("content")
        return {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
            **(
                {"reasoning_content": delta["reasoning_content"]}
                if "reasoning_content" in delta
                else {}
            ),
            **({"tool_calls": calls} if calls else {}),
        }

    def _add(self, delta: dict[str, Any], piece: Piece) -> None:
        if piece.kind in _TEXTS:
            name = _TEXTS[piece.kind]
            delta[name] = delta.get(name, "") + piece.text
            return
        calls = delta.setdefault("tool_calls", [])
        if piece.kind == "name":
            call = {"index": self._num_calls, "id": f"call_{secrets.token_hex(12)}"}
            function = {"name": piece.text, "arguments": ""}
            calls.append(call | {"type": "function", "function": function})
            self._num_calls += 1
            return
        if not calls or calls[-1]["index"] != self._num_calls - 1:
            calls.append({"index": self._num_calls - 1, "function": {"arguments": ""}})
        calls[-1]["function"]["arguments"] += piece.text


_TEXTS = {"content": "content", "reasoning": "reasoning_content"}
