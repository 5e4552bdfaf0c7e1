"""What clients that nobody here wrote send, as `scripts/clients.py --record` noted it down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from running_gateway import running_gateway
from stream import TIMEOUT
from tandem import Engine, SamplingParams
from tandem_runtime.server import TritonServer

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
# The server's own, in the places of the base model and of the chat model.
MOST = 40
# What clients look for, and do without.
NOT_HERE = {"/tokenizer_info"}
MODELS = {"tandem": "tandem", "tandem_chat": "short_queue"}


@pytest.fixture(scope="module")
def url(server: TritonServer) -> Iterator[str]:
    with running_gateway(server) as url:
        yield url


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_clients_send_is_answered(url: str, engine: Engine, path: Path) -> None:
    """In the shapes of the `openai` package, and streams with the same text as whole answers."""
    for request in json.loads(path.read_text()):
        if "body" not in request:
            answer = requests.request(request["method"], url + request["path"], timeout=TIMEOUT)
            there_is = request["path"] not in NOT_HERE
            assert answer.status_code == (200 if there_is else 404), request["path"]
            continue
        # The model may choose other tokens each time.
        body = {"seed": 1} | request["body"]
        body["model"] = MODELS[body["model"].rpartition("/")[2]]
        if "prompt" in body:
            body["prompt"] = within_vocabulary(body["prompt"], len(engine.tokenizer))
        # A model of no sense doesn't end by itself.
        limit = "max_output_tokens" if "input" in body else "max_completion_tokens"
        if "prompt" not in body and body.get("max_tokens", body.get(limit)) is None:
            body[limit] = MOST
        check = {"/v1/chat/completions": check_chat, "/v1/completions": check_completion}
        check.get(request["path"], check_response)(url + request["path"], body, engine)


def check_completion(url: str, body: dict[str, Any], engine: Engine) -> None:
    answer = post(url, body | {"stream": False})
    if body.get("echo") and body.get("logprobs") is not None:
        check_likelihoods(answer, body, engine)
        return
    whole = Completion.model_validate(answer)
    # The package has no name for the pieces of a stream, whose reasons are null up to the last.
    for index, choice in enumerate(whole.choices):
        pieces = [c for part in stream(url, body) for c in part["choices"] if c["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice.text
        assert pieces[-1]["finish_reason"] == choice.finish_reason
    is_plain = isinstance(body["prompt"], str) and not body.get("echo")
    if is_plain and body.get("temperature") == 0:
        params = SamplingParams(temperature=0, max_tokens=body["max_tokens"])
        (expected,) = engine.generate([body["prompt"]], params)
        assert whole.choices[0].text == expected.text


def check_likelihoods(answer: Any, body: dict[str, Any], engine: Engine) -> None:
    """Of prompts as tokens, as suites that evaluate models ask for them."""
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    scored = engine.generate(prompts, SamplingParams(max_tokens=0, prompt_logprobs=0))
    for choice, expected in zip(answer["choices"], scored, strict=True):
        # The first is null, which the package has no type for.
        first, *found = choice["logprobs"]["token_logprobs"]
        assert first is None
        assert len(found) == len(expected.prompt_logprobs) + body["max_tokens"]
        for one, other in zip(found, expected.prompt_logprobs, strict=False):
            assert one == pytest.approx(other.logprob, abs=1e-4)


def within_vocabulary(prompt: Any, size: int) -> Any:
    """The prompt, with token ids that the server's model has."""
    if isinstance(prompt, list):
        return [within_vocabulary(each, size) for each in prompt]
    return prompt % size if isinstance(prompt, int) else prompt


def check_chat(url: str, body: dict[str, Any], _: Engine) -> None:
    whole = ChatCompletion.model_validate(post(url, body | {"stream": False}))
    parts = [ChatCompletionChunk.model_validate(each) for each in stream(url, body)]
    for index, choice in enumerate(whole.choices):
        pieces = [c for part in parts for c in part.choices if c.index == index]
        assert "".join(p.delta.content or "" for p in pieces) == (choice.message.content or "")
        reasons = [p.finish_reason for p in pieces if p.finish_reason is not None]
        assert reasons == [choice.finish_reason]
        calls = [call for p in pieces for call in p.delta.tool_calls or ()]
        for number, call in enumerate(choice.message.tool_calls or ()):
            mine = [each.function for each in calls if each.index == number]
            assert "".join(each.name or "" for each in mine) == call.function.name
            assert "".join(each.arguments or "" for each in mine) == call.function.arguments
            assert call.function.name in {t["function"]["name"] for t in body["tools"]}
            if choice.finish_reason == "tool_calls":
                json.loads(call.function.arguments)
        if choice.finish_reason == "stop":
            assert body.get("tool_choice", "auto") in ("auto", "none")
    if (body.get("stream_options") or {}).get("include_usage"):
        assert parts[-1].usage is not None
        assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def check_response(url: str, body: dict[str, Any], _: Engine) -> None:
    whole = Response.model_validate(post(url, body | {"stream": False}))
    assert whole.status in ("completed", "incomplete")


def post(url: str, body: dict[str, Any]) -> Any:
    body.pop("stream_options", None)
    answer = requests.post(url, json=body, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(url: str, body: dict[str, Any]) -> list[Any]:
    answer = requests.post(url, json=body | {"stream": True}, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]
