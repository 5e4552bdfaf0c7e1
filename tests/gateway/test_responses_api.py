"""`/v1/responses`: what it asks for, and its events, by the models of the `openai` package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway_setup import TIMEOUT, FakeTriton, error_of, fake_triton, gateway
from tandem_client import Chunk
from tandem_gateway.errors import APIError
from tandem_gateway.responses import Usage
from tandem_gateway.responses_api.events import Event, ResponseWriter
from tandem_gateway.responses_api.request import ResponsesRequest
from tandem_options import OptionError

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
TEXT = ["output_item.added", "content_part.added"]
TEXT_END = ["output_text.done", "content_part.done", "output_item.done"]


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture(scope="module")
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(upstream.url) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def asked(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest(**{"model": "tandem", "input": "hi", **fields})


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def call(index: int, text: str, name: str | None = None) -> dict[str, Any]:
    function = {"arguments": text} | ({"name": name} if name else {})
    begin = {"id": f"call_{index}", "type": "function"} if name else {}
    return chunk(tool_calls=[{"index": index, "function": function, **begin}])


def written(*chunks: dict[str, Any]) -> list[Event]:
    """The events of an answer, each of which the package's own models take."""
    writer, usage = ResponseWriter(asked(tools=[TOOL])), Usage()
    usage.add(0, Chunk("x", num_input_tokens=4, num_output_tokens=3, num_cached_tokens=2))
    events = list(writer.begin())
    for each in chunks:
        events += writer.add(each)
    events += writer.end(usage)
    for event in events:
        EVENTS.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == writer.response
    # What an event says of an item is what the item was then.
    assert events[0]["response"]["output"] == []
    return events


def kinds(events: list[Event]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_becomes_typed_events() -> None:
    events = written(chunk(content="a", role="assistant"), chunk(content="b"), chunk("stop"))
    deltas = ["output_text.delta"] * 2
    assert kinds(events) == ["created", "in_progress", *TEXT, *deltas, *TEXT_END, "completed"]
    assert [event["delta"] for event in events if "delta" in event] == ["a", "b"]
    response = Response.model_validate(events[-1]["response"])
    assert (response.status, response.output_text) == ("completed", "ab")
    assert response.output[0].status == "completed"
    assert events[2]["item"]["content"] == []
    assert events[3]["part"]["text"] == ""
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert (response.usage.input_tokens, response.usage.output_tokens) == (4, 3)


def test_an_empty_answer_is_a_message() -> None:
    response = Response.model_validate(written(chunk("stop"))[-1]["response"])
    assert (response.output_text, len(response.output)) == ("", 1)


def test_an_answer_that_was_cut_says_so() -> None:
    events = written(chunk(content="a"), chunk("length"))
    assert kinds(events)[-1] == "incomplete"
    response = events[-1]["response"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")


def test_thinking_and_calls_are_items_of_their_own() -> None:
    events = written(
        chunk(reasoning_content="hm"),
        chunk(content="well"),
        call(0, "", "add"),
        call(0, '{"a":'),
        call(0, "1}"),
        call(1, "{}", "add"),
        chunk("tool_calls"),
    )
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", *["function_call"] * 2]
    assert [item["arguments"] for item in output[2:]] == ['{"a":1}', "{}"]
    assert [(item["call_id"], item["name"]) for item in output[2:]] == [
        ("call_0", "add"),
        ("call_1", "add"),
    ]
    assert output[0]["content"][0]["text"] == "hm"
    calls = ["function_call_arguments.delta"] * 2 + ["function_call_arguments.done"]
    begin = kinds(events).index("function_call_arguments.delta")
    assert kinds(events)[begin - 1 : begin + 4] == [
        "output_item.added",
        *calls,
        "output_item.done",
    ]
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places)
    assert set(places) == {0, 1, 2, 3}


def test_log_probabilities_come_with_the_text() -> None:
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    given = chunk(content="a")
    given["choices"][0]["logprobs"] = {"content": [entry]}
    events = written(given, chunk("stop"))
    assert [event["logprobs"] for event in events if "logprobs" in event] == [[entry]] * 2
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [entry]


def test_an_answer_that_breaks_off_says_so() -> None:
    writer = ResponseWriter(asked())
    events = [*writer.begin(), *writer.add(chunk(content="a"))]
    events += writer.fail(APIError(503, "the model is gone"))
    for event in events:
        EVENTS.validate_python(event)
    assert kinds(events)[-1] == "failed"
    assert events[-1]["response"]["error"]["message"] == "the model is gone"


def test_items_become_messages() -> None:
    said = [{"type": "output_text", "text": "I add."}]
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "2+2?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": said},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "5"}],
        },
    ]
    function = {"name": "add", "arguments": "{}"}
    assert asked(instructions="You help.", input=items).to_chat().messages == [
        {"role": "system", "content": "You help."},
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [
                {"id": name, "type": "function", "function": function} for name in ("c1", "c2")
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
        {"role": "tool", "tool_call_id": "c2", "content": "5"},
    ]


def test_tools_and_formats_become_a_chat_completion_s() -> None:
    schema = {"type": "object"}
    form = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    chat = asked(tools=[TOOL], text=form, max_output_tokens=7, temperature=0.5).to_chat()
    function = {name: value for name, value in TOOL.items() if name != "type"}
    assert chat.tools == [{"type": "function", "function": function}]
    assert chat.response_format is not None
    assert chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.schema_ == schema
    assert (chat.options()["max_tokens"], chat.options()["temperature"]) == (7, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id must not be given: nothing is"),
        ({"background": True}, "background must not be given"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0 must be one of message, fu"),
        ({"input": [{"type": ["x"]}]}, "input.0 must be one of message, fu"),
        ({"input": [{"role": "user", "content": [{"type": ["x"]}]}]}, "input.0 must be text only"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0 must be text only, got 'input_image'",
        ),
        ({"tools": [{"type": "mcp"}]}, "tools must be of type 'function', got 'mcp'"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice must be of type 'function', got 'mcp'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema is missing"),
        ({"n": 2}, "n must be 1, got 2"),
    ],
)
def test_what_can_t_be_answered_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        asked(**fields).to_chat()
    assert str(refused.value).startswith(message)


def test_the_package_reads_both_ways_of_an_answer(client: OpenAI) -> None:
    answer = client.responses.create(model="tandem", input="a b", store=True)
    events = list(client.responses.create(model="tandem", input="a b", stream=True))
    last = events[-1]
    assert last.type == "response.completed"
    assert answer.output_text == last.response.output_text
    assert '"content":' in answer.output_text  # the server that is made up repeats the messages
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(deltas)


def test_the_server_s_refusal_has_its_status(upstream: FakeTriton, url: str) -> None:
    upstream.refusal = "INVALID_ARG: no such thing"
    try:
        for stream in (False, True):
            body = {"model": "tandem", "input": "a", "stream": stream}
            answer = requests.post(f"{url}/v1/responses", json=body, timeout=TIMEOUT)
            assert answer.status_code == 400
            assert error_of(answer)["message"] == "no such thing"
    finally:
        upstream.refusal = ""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "a", "previous_response_id": "r"}, "previous_response_id must not be given"),
        ({"input": "a", "temperature": "warm"}, "temperature "),
        ({"input": []}, "messages must hold at least one message"),
        ({}, "input: Field required"),
    ],
)
def test_errors_have_openai_s_shape(url: str, body: Any, message: str) -> None:
    answer = requests.post(
        f"{url}/v1/responses", data=json.dumps({"model": "tandem", **body}), timeout=TIMEOUT
    )
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith(message)
