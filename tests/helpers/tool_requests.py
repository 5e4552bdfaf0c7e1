"""Chat requests with tools, and a call as models write it."""

from __future__ import annotations

from typing import Any

from tandem_gateway.schema import ChatCompletionRequest

HERMES = "<tool_call></tool_call> {% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "weather"}}
MESSAGES = [{"role": "user", "content": "a"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def request_of(**more: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(**{"model": "m", "messages": MESSAGES, "tools": TOOLS, **more})
