"""Questions that ask for no text, through the real server, against the tokenizer itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from conftest import CHAT_TEMPLATE
from repositories import MAX_MODEL_LEN
from stream import TIMEOUT, metric
from tandem import Engine
from tandem_client import AsyncClient, Client, Description, RequestError
from tandem_client.protocol import Exchange, make_request
from tandem_runtime.server import TritonServer

CONVERSATION = [{"role": "user", "content": "hi"}]
TEXT = "ab <end> é"


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def chat(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, "short_queue") as client:
        yield client


def test_a_model_says_what_it_is(client: Client, chat: Client) -> None:
    said = client.describe()
    assert said == Description(
        chat_template=None,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=384,
        dtype="float32",
        eos_token_ids=[1, 5],
        eos_tokens=["<eos>", "<end>"],
        drafters={"none": 0, "ngram": 4},
        default_drafter="ngram",
    )
    assert chat.describe().chat_template == CHAT_TEMPLATE


def test_text_becomes_tokens_and_text_again(client: Client, engine: Engine) -> None:
    expected = engine.tokenizer(TEXT)["input_ids"]
    tokens = client.tokenize(TEXT, return_token_strs=True)
    assert tokens.ids == expected
    assert tokens.texts == ["a", "b", "Ġ", "<end>", "Ġ", "Ã", "©"]
    assert client.tokenize(TEXT).texts is None
    assert client.detokenize(tokens.ids) == TEXT
    assert client.tokenize("").ids == []


def test_a_conversation_becomes_tokens(chat: Client, engine: Engine) -> None:
    for add, end in ((True, "<turn>assistant:"), (False, "")):
        tokens = chat.tokenize(CONVERSATION, add_generation_prompt=add)
        assert tokens.ids == engine.tokenizer("<turn>user:hi<end>" + end)["input_ids"]
    unfinished = [*CONVERSATION, {"role": "assistant", "content": "he"}]
    tokens = chat.tokenize(unfinished, continue_final_message=True)
    assert chat.detokenize(tokens.ids).endswith("<turn>assistant:he")
    told = chat.tokenize(
        CONVERSATION, chat_template_kwargs={"mood": "calm"}, reasoning_effort="low"
    )
    assert chat.detokenize(told.ids).startswith("mood: calmeffort: low<turn>user:hi")
    tools = [{"name": "clock"}]
    assert chat.detokenize(chat.tokenize(CONVERSATION, tools=tools).ids).startswith("tools: clock")


def test_the_asyncio_client_asks_the_same(server: TritonServer, client: Client) -> None:
    async def ask() -> tuple[Any, ...]:
        async with AsyncClient(server.grpc_url) as other:
            tokens = await other.tokenize(TEXT)
            return await other.describe(), tokens, await other.detokenize(tokens.ids)

    assert asyncio.run(ask()) == (client.describe(), client.tokenize(TEXT), TEXT)


def test_curl_asks_with_parameters(server: TritonServer, engine: Engine) -> None:
    body = {"text_input": "ab", "tandem_query": "tokenize", "return_token_strs": True}
    url = f"{server.http_url}/v2/models/tandem/generate"
    answer = requests.post(url, json=body, timeout=TIMEOUT).json()
    expected = {"token_ids": engine.tokenizer("ab")["input_ids"], "token_strs": ["a", "b"]}
    assert json.loads(answer["text_output"]) == expected


def ask(client: Client, question: str, prompt: Any, **options: Any) -> list[Any]:
    request = make_request(client.model, prompt, stream=False, options=options)
    request.parameters["tandem_query"].string_param = question
    return list(client._run(Exchange(client.url, request, lambda result: [result])))


@pytest.mark.parametrize(
    ("question", "prompt", "options", "message"),
    [
        ("what", "x", {}, "tandem_query must be one of describe, tokenize, detokenize, got 'what'"),
        ("tokenize", "x", {"top_k": 1}, "unknown parameter 'top_k'; a tandem_query has add_spec"),
        ("tokenize", "x", {"add_special_tokens": 1}, "add_special_tokens must be true or false, g"),
        ("tokenize", [7], {"add_special_tokens": True}, "add_special_tokens: true is for text, no"),
        ("tokenize", CONVERSATION, {}, "messages can't be used: this model has no chat template"),
        (
            "tokenize",
            "x" * 64 * (MAX_MODEL_LEN + 1),
            {},
            "text_input is too long: this model's maximum context length is 16000 tokens",
        ),
        ("detokenize", "x", {}, "detokenize needs input_ids"),
        ("detokenize", [384], {}, "input_ids must be whole numbers below 384, got 384"),
        ("detokenize", [-1], {}, "input_ids must be whole numbers below 384, got -1"),
        (
            "detokenize",
            [7] * (MAX_MODEL_LEN + 1),
            {},
            "input_ids is too long: this model",
        ),
    ],
)
def test_a_wrong_question_is_refused_by_name(
    client: Client, question: str, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        ask(client, question, prompt, **options)
    assert refused.value.code == "INVALID_ARG"
    assert str(refused.value).startswith(message)


def test_a_question_has_one_answer_and_counts_as_no_request(
    server: TritonServer, client: Client
) -> None:
    names = ("request_success_total", "request_failure_total")
    before = [metric(server, name) for name in names]
    assert len(ask(client, "describe", "")) == 1
    assert [metric(server, name) for name in names] == before
