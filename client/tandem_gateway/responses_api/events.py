"""The chunks of a chat completion as the items and typed events of a response."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from tandem_gateway.errors import APIError
from tandem_gateway.responses import Usage
from tandem_gateway.responses_api.request import ResponsesRequest

Event = dict[str, Any]
# Item -> the events of its text, and where the text is in them.
_DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class ResponseWriter:
    """Makes one response of an answer's chunks, and tells each change of it as an event."""

    def __init__(self, request: ResponsesRequest) -> None:
        self._number = 0
        self._item: dict[str, Any] | None = None  # the one that is being written
        self._logprobs: list[Any] = []
        self._reason = "stop"
        self.response = _begin(request)

    def begin(self) -> Iterator[Event]:
        """The events before any text."""
        yield self._event("response.created", response=self._snapshot())
        yield self._event("response.in_progress", response=self._snapshot())

    def add(self, chunk: dict[str, Any]) -> Iterator[Event]:
        """The events of a chunk of a chat completion."""
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        if delta.get("reasoning_content"):
            yield from self._write("reasoning", delta["reasoning_content"], [])
        if delta.get("content"):
            yield from self._write("message", delta["content"], logprobs)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if function.get("name"):
                yield from self._close()
                yield from self._open("function_call", call.get("id"), function["name"])
            if function.get("arguments"):
                yield from self._write("function_call", function["arguments"], [])
        self._reason = choice.get("finish_reason") or self._reason

    def end(self, usage: Usage) -> Iterator[Event]:
        """The events after all text."""
        if self._item is None and not self.response["output"]:
            yield from self._open("message")
        is_cut = self._reason == "length"
        status = "incomplete" if is_cut else "completed"
        yield from self._close(status)
        self.response["status"] = status
        self.response["usage"] = _usage(usage)
        self.response["completed_at"] = None if is_cut else int(time.time())
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response |= usage.metrics()
        yield self._event(f"response.{status}", response=self._snapshot())

    def fail(self, error: APIError) -> Iterator[Event]:
        """The last event of an answer that broke off."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": str(error)}
        yield self._event("response.failed", response=self._snapshot())

    def _write(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[Event]:
        if self._item is None or self._item["type"] != kind:
            yield from self._close()
            yield from self._open(kind)
        assert self._item is not None
        self._logprobs += logprobs
        if kind == "function_call":
            self._item["arguments"] += text
        else:
            self._item["content"][0]["text"] += text
        more = {"logprobs": logprobs} if kind == "message" else {}
        yield self._of_text("delta", delta=text, **more)

    def _open(self, kind: str, call_id: str | None = None, name: str = "") -> Iterator[Event]:
        item: dict[str, Any] = {"id": _id(kind), "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": call_id or _id("call"), "name": name, "arguments": ""}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"role": "assistant", "content": []}
        self._item = item
        self._logprobs = []
        self.response["output"].append(item)
        yield self._of_item("response.output_item.added")
        if kind != "function_call":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(part)
            yield self._of_part("response.content_part.added")

    def _close(self, status: str = "completed") -> Iterator[Event]:
        item = self._item
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            yield self._of_text("done", name=item["name"], arguments=item["arguments"])
        else:
            (part,) = item["content"]
            more = {}
            if item["type"] == "message":
                part["logprobs"] = self._logprobs
                more = {"logprobs": self._logprobs}
            yield self._of_text("done", text=part["text"], **more)
            yield self._of_part("response.content_part.done")
        yield self._of_item("response.output_item.done")
        self._item = None

    def _of_item(self, kind: str) -> Event:
        return self._event(kind, output_index=self._place, item=_copy(self._item))

    def _of_part(self, kind: str) -> Event:
        assert self._item is not None
        part = _copy(self._item["content"][0])
        return self._event(kind, **self._where(), part=part)

    def _of_text(self, what: str, **values: Any) -> Event:
        assert self._item is not None
        return self._event(f"{_DELTAS[self._item['type']]}.{what}", **self._where(), **values)

    def _where(self) -> dict[str, Any]:
        assert self._item is not None
        where = {"item_id": self._item["id"], "output_index": self._place}
        return where if self._item["type"] == "function_call" else where | {"content_index": 0}

    @property
    def _place(self) -> int:
        return len(self.response["output"]) - 1

    def _snapshot(self) -> dict[str, Any]:
        return self.response | {"output": [_copy(item) for item in self.response["output"]]}

    def _event(self, kind: str, **values: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return event


def _copy(item: dict[str, Any] | None) -> dict[str, Any]:
    """As it is now; what is added later goes to the item's own parts."""
    assert item is not None
    copied = dict(item)
    if "content" in copied:
        copied["content"] = [dict(part) for part in copied["content"]]
    return copied


def _id(kind: str) -> str:
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}.get(kind, kind)
    return f"{prefix}_{secrets.token_hex(12)}"


def _begin(request: ResponsesRequest) -> dict[str, Any]:
    text = request.text.format if request.text and request.text.format else None
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.other("metadata") or {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": request.reasoning.effort if request.reasoning else None,
            "summary": None,
        },
        "store": False,
        "temperature": request.other("temperature"),
        "text": {
            "format": text.model_dump(by_alias=True, exclude_none=True)
            if text
            else {"type": "text"}
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_p": request.other("top_p"),
        "truncation": "disabled",
        "usage": None,
        "user": request.other("user"),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    """As `/v1/responses` calls them, and what speculation did."""
    found = usage.to_json()
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {"cache_write_tokens": 0, **found["prompt_tokens_details"]},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": found["completion_tokens_details"].get("reasoning_tokens", 0)
        },
        "total_tokens": found["total_tokens"],
        "speculation": found["speculation"],
    }
