"""`/tokenize` and `/detokenize`, as vLLM's server has them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from tandem_client import AsyncClient, Prompt
from tandem_gateway.errors import APIError
from tandem_gateway.models import Models
from tandem_gateway.schema import Values
from tandem_gateway.tools.messages import for_template

_T = TypeVar("_T")


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: a prompt or messages."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: Values[dict[str, Any]] | None = None
    tools: Values[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    tokens: Values[int]


class Tokenization:
    """The two routes.

    Args:
        models: those that there are.
        seconds: how long a model may take to answer.
    """

    def __init__(self, models: Models, seconds: float) -> None:
        self._models = models
        self._seconds = seconds

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """`POST /tokenize`."""
        client = await self._find(request.model)
        options: Any = request.model_dump(exclude={"model", "prompt", "messages"})
        description = await self._models.describe(client.model)
        prompt = _prompt(request, description.chat_template or "")
        tokens = await self._in_time(client.tokenize(prompt, **options))
        return {
            "count": len(tokens.ids),
            "max_model_len": description.max_model_len,
            "tokens": tokens.ids,
            "token_strs": tokens.texts,
        }

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, str]:
        """`POST /detokenize`."""
        client = await self._find(request.model)
        if not request.tokens:
            return {"prompt": ""}
        return {"prompt": await self._in_time(client.detokenize(request.tokens))}

    async def _in_time(self, answer: Awaitable[_T]) -> _T:
        try:
            async with asyncio.timeout(self._seconds):
                return await answer
        except TimeoutError:
            message = f"nothing came from the model for {self._seconds:g} s"
            raise APIError(504, message, "timeout") from None

    async def _find(self, name: str | None) -> AsyncClient:
        """A model, which needs no name where it is the only one."""
        if name is not None:
            return await self._models.find(name)
        clients = await self._models.clients()
        if len(clients) != 1:
            message = f"model: name one of {', '.join(map(repr, clients))}"
            raise APIError(400, message, "invalid_value", "model")
        return next(iter(clients.values()))


def _prompt(request: TokenizeRequest, template: str) -> Prompt:
    if (request.prompt is None) == (request.messages is None):
        raise APIError(400, "give exactly one of prompt and messages", "invalid_value", "prompt")
    if request.prompt is not None:
        return request.prompt
    return for_template(request.messages or [], template)
