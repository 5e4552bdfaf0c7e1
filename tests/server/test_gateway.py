"""The OpenAI gateway in front of a real server, with the real `openai` package and a browser."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
from openai import OpenAI
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from http_process import post_from_a_process
from running_gateway import running_gateway
from stream import TIMEOUT, metric, wait_until
from tandem import Engine
from tandem_runtime import demo
from tandem_runtime.paths import ROOT
from tandem_runtime.server import ONE_BY_ONE, TritonServer
from tensors import COMMON, PROMPT, offline

KEY = "secret"
QUESTION = "The planets of the solar system are"
SCREENSHOT = ROOT / "docs" / "chat.png"


@pytest.fixture(scope="module")
def url(server: TritonServer) -> Iterator[str]:
    """A gateway with a key; its model has no chat template."""
    with running_gateway(
        server, "--model", "tandem", "--max-body-bytes", "100000", keys=f"other,{KEY}"
    ) as url:
        yield url


@pytest.fixture(scope="module")
def chat_url(server: TritonServer) -> Iterator[str]:
    """A gateway without keys; its model has a chat template."""
    with running_gateway(server, "--model", "short_queue") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def chat(chat_url: str) -> OpenAI:
    return OpenAI(base_url=f"{chat_url}/v1", api_key="none", max_retries=0)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tandem"]
    assert client.models.retrieve("tandem").id == "tandem"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_completion(client: OpenAI, engine: Engine) -> None:
    answer = client.completions.create(model="tandem", prompt=PROMPT, **COMMON)
    assert answer.choices[0].text == offline(engine)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.total_tokens == len(PROMPT) + answer.usage.completion_tokens


def test_a_streamed_completion(client: OpenAI, engine: Engine) -> None:
    options = {**COMMON, "temperature": 0.0, "max_tokens": 1000}
    stream = client.completions.create(
        model="tandem",
        prompt=PROMPT,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "drafter": "ngram", "num_speculative_tokens": 3},
        **options,
    )
    *chunks, last = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == offline(
        engine, temperature=0.0, ignore_eos=True, max_tokens=1000
    )
    assert len(chunks) > 1
    assert last.choices == []
    assert all("usage" in chunk.model_fields_set for chunk in chunks)
    assert {chunk.usage for chunk in chunks} == {None}
    speculation = last.usage.speculation
    details = last.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == speculation["num_accepted_tokens"] > 0
    assert speculation["num_draft_tokens"] <= 3 * speculation["num_drafts"]
    for chunk in chunks:
        assert 0 <= chunk.choices[0].accepted_text_length <= len(chunk.choices[0].text)


def test_speculation_is_where_aiperf_looks_for_it(client: OpenAI) -> None:
    """The sums are those that aiperf checks before it takes the record."""
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 60, "seed": 3}
    options |= {"model": "tandem", "prompt": PROMPT}
    greedy = {"ignore_eos": True, "num_speculative_tokens": 3}
    whole = client.completions.create(**options, extra_body=greedy)
    wanted: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        **options, extra_body=greedy, stream=True, stream_options=wanted
    )
    *chunks, last = list(stream)
    for answer in (whole, last):
        found = answer.metrics["speculative_decoding"]
        histogram = found["acceptance_histogram"]
        assert len(histogram) - 1 == found["num_spec_tokens"] == 3
        assert sum(histogram) == found["num_spec_steps"] > 0
        accepted = sum(number * count for number, count in enumerate(histogram))
        assert accepted == found["num_accepted_draft_tokens"] > 0
        rate, length = found["draft_acceptance_rate"], found["mean_acceptance_length"]
        assert rate == pytest.approx(accepted / found["num_draft_tokens"])
        assert length == pytest.approx(1 + accepted / found["num_spec_steps"])
        ours = answer.usage.speculation
        assert (ours["num_drafts"], ours["num_accepted_tokens"]) == (sum(histogram), accepted)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last.usage.completion_tokens == options["max_tokens"]
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {len(PROMPT)}
    # Of several answers, and where nothing is drafted, there is no such record.
    for more in ({"n": 2}, {"extra_body": {"drafter": "none"}}, {"prompt": ["a", "b"]}):
        assert not hasattr(client.completions.create(**{**options, **more}), "metrics")


def test_usage_says_how_much_of_the_prompt_was_cached(client: OpenAI) -> None:
    prompts = ["a question that the gateway is asked", "and another, as long as the first is"]
    for cached, salt in ((0, "mine"), (2 * 32, "mine"), (0, "yours")):
        answer = client.completions.create(
            model="tandem", prompt=prompts, extra_body={"cache_salt": salt}, **COMMON
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == cached


def test_several_prompts_and_sequences(client: OpenAI, engine: Engine) -> None:
    """Choice n * i + j is sequence j of prompt i, whose seed is `seed + j`."""
    prompts = ["abc", "xyz"]
    expected = [
        offline(engine, prompt, seed=COMMON["seed"] + j) for prompt in prompts for j in range(2)
    ]
    answer = client.completions.create(model="tandem", prompt=prompts, n=2, **COMMON)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    texts = [""] * 4
    for chunk in client.completions.create(
        model="tandem", prompt=prompts, n=2, stream=True, **COMMON
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_prompts_of_tokens_and_echo(client: OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer(PROMPT)["input_ids"]
    answer = client.completions.create(model="tandem", prompt=ids, echo=True, **COMMON)
    assert answer.choices[0].text == PROMPT + offline(engine)


def test_a_conversation(chat: OpenAI, engine: Engine) -> None:
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    prompt = "<turn>system:be brief<end><turn>user:hi<end><turn>assistant:"
    told = {"chat_template_kwargs": {"mood": "calm"}, "reasoning_effort": "low"}
    with_more = chat.chat.completions.create(
        model="short_queue", messages=messages, extra_body=told, **COMMON
    )
    assert with_more.choices[0].message.content == offline(engine, f"mood: calmeffort: low{prompt}")
    answer = chat.chat.completions.create(
        model="short_queue", messages=messages, logprobs=True, top_logprobs=2, **COMMON
    )
    assert answer.choices[0].message.content == offline(engine, prompt)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in content)
    tools: Any = [{"type": "function", "function": {"name": "f"}, "name": "clock"}]
    answer = chat.chat.completions.create(
        model="short_queue", messages=messages, tools=tools, **COMMON
    )
    assert answer.choices[0].message.content == offline(engine, f"tools: clock{prompt}")
    stream = chat.chat.completions.create(
        model="short_queue", messages=messages, stream=True, **COMMON
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == offline(engine, prompt)


def test_structured_answers(chat: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    formats: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        {"type": "json_object"},
    ]
    messages: Any = [{"role": "user", "content": "hi"}]
    for response_format in formats:
        answer = chat.chat.completions.create(
            model="short_queue",
            messages=messages,
            response_format=response_format,
            logit_bias={"96": 100},  # a closing brace, where it is allowed
            **{**COMMON, "max_tokens": 200},
        )
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_a_response(chat: OpenAI, engine: Engine) -> None:
    prompt = "<turn>system:be brief<end><turn>user:hi<end><turn>assistant:"
    asked: dict[str, Any] = {
        "model": "short_queue",
        "instructions": "be brief",
        "input": "hi",
        "max_output_tokens": COMMON["max_tokens"],
        "temperature": COMMON["temperature"],
        "extra_body": {"seed": COMMON["seed"], "ignore_eos": True},
    }
    expected = offline(engine, prompt, ignore_eos=True)
    answer = chat.responses.create(**asked)
    assert answer.output_text == expected
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == COMMON["max_tokens"]
    assert answer.usage.total_tokens == answer.usage.input_tokens + COMMON["max_tokens"]
    events = list(chat.responses.create(**asked, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == expected == events[-1].response.output_text
    assert events[-1].type == "response.incomplete"
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = chat.responses.create(
        **{**asked, "max_output_tokens": 200, "extra_body": {"logit_bias": {"96": 100}, "seed": 3}},
        text={"format": {"type": "json_schema", "name": "answer", "schema": schema}},
    )
    assert isinstance(json.loads(answer.output_text)["ok"], bool)
    with pytest.raises(openai.BadRequestError, match="previous_response_id must not be given"):
        chat.responses.create(**asked, previous_response_id="resp_1")


def post(url: str, path: str, body: Any, key: str = KEY) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return requests.post(f"{url}{path}", json=body, headers=headers, timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "x"}, 400, "model: Field required"),
        ({"model": "tandem"}, 400, "prompt: Field required"),
        ({"model": "gpt", "prompt": "x"}, 404, "the model 'gpt' does not exist"),
        (
            {"model": "tandem", "prompt": "x", "suffix": "y"},
            400,
            "suffix must be left out, got 'y'",
        ),
        ({"model": "tandem", "prompt": "x", "n": 0}, 400, "n: Input should be greater"),
        ({"model": "tandem", "prompt": "x", "temperature": -1}, 400, "temperature must be"),
        ({"model": "tandem", "prompt": "x", "drafter": "y"}, 400, "unknown drafter 'y'"),
        ({"model": "tandem", "prompt": "", "stream": True}, 400, "prompt must hold at least one"),
        ({"model": "tandem", "prompt": []}, 400, "prompt must hold at least one"),
        ({"model": "tandem", "prompt": "x" * 200_000}, 413, "larger than 100000 bytes"),
    ],
)
def test_errors_are_openais(url: str, body: Any, status: int, message: str) -> None:
    answer = post(url, "/v1/completions", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_model_without_a_template_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template") as refusal:
        client.chat.completions.create(
            model="tandem", messages=[{"role": "user", "content": "hi"}], stream=True
        )
    assert refusal.value.code == "no_chat_template"


def test_keys(url: str) -> None:
    body = {"model": "tandem", "prompt": "x"}
    for key in ("wrong", "", f"{KEY}x", "ü"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        answer = requests.post(f"{url}/v1/completions", json=body, headers=headers, timeout=TIMEOUT)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert requests.get(f"{url}/v1/models", timeout=TIMEOUT).status_code == 401
    assert requests.get(f"{url}/health", timeout=TIMEOUT).status_code == 200
    assert requests.get(f"{url}/nowhere", timeout=TIMEOUT).json()["error"]["code"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_the_server(
    server: TritonServer, url: str, stream: bool
) -> None:
    body = {"model": "tandem", "prompt": "x", "max_tokens": 15000, "ignore_eos": True}
    body["stream"] = stream
    key = f"Authorization: Bearer {KEY}"
    with post_from_a_process(f"{url}/v1/completions", body, key) as process:
        wait_until(lambda: metric(server, "num_requests_running") == 1)
        process.kill()
    wait_until(lambda: metric(server, "num_requests_running") == 0, seconds=3)


def test_an_absent_server_is_unavailable() -> None:
    from fastapi.testclient import TestClient

    from tandem_gateway import create_app

    with TestClient(create_app("127.0.0.1:9")) as client:
        assert client.get("/health").status_code == 503
        answer = client.post("/v1/completions", json={"model": "tandem", "prompt": "x"})
    assert answer.status_code == 503
    assert "no server answers at 127.0.0.1:9" in answer.json()["error"]["message"]


def test_the_chat_page(find_tool: Callable[[str], str]) -> None:
    """In headless Chromium, with the published models: a question, and a text that is continued.

    It writes the documentation's screenshot when SCREENSHOT=1.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = find_tool("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--window-size=900,700"):
        options.add_argument(argument)
    service = webdriver.ChromeService(find_tool("chromedriver"))
    with (
        TritonServer(ROOT / "model_repository", extra_args=[ONE_BY_ONE]) as server,
        running_gateway(server) as url,
        webdriver.Chrome(options=options, service=service) as browser,
    ):
        browser.get(url)
        browser.execute_script("document.querySelector('#temperature').value = 0")
        model = Select(browser.find_element(By.ID, "model"))
        wait_until(lambda: len(model.options) == 2)
        assert model.first_selected_option.text == "tandem_chat"
        mode = browser.find_element(By.ID, "mode")
        assert mode.text == ""
        answer = send_on_page(browser, demo.QUESTION)
        assert answer.text.startswith("The capital of France is Paris")

        model.select_by_visible_text("tandem")
        assert mode.text.startswith("This model has no chat template")
        browser.find_element(By.ID, "new").click()
        answer = send_on_page(browser, QUESTION)
        tinted = browser.find_elements(By.CSS_SELECTOR, ".accepted")
        assert 0 < sum(len(part.text) for part in tinted) < len(answer.text)
        if os.environ.get("SCREENSHOT"):
            browser.save_screenshot(SCREENSHOT)


def send_on_page(browser: webdriver.Chrome, text: str) -> WebElement:
    """Sends a text, and waits for the end of the answer."""
    browser.find_element(By.ID, "prompt").send_keys(text, Keys.ENTER)
    status = browser.find_element(By.ID, "status")
    wait_until(lambda: "tokens/s" in status.text, 90)
    assert not browser.find_elements(By.CSS_SELECTOR, ".message.error")
    (answer,) = browser.find_elements(By.CSS_SELECTOR, ".message.assistant")
    return answer


@pytest.mark.slow
def test_streams_end_when_the_models_process_is_killed(private_repository: Path) -> None:
    """Within five seconds; Triton itself leaves them open and says that it is ready."""
    with (
        TritonServer(private_repository) as server,
        running_gateway(server, "--model", "tandem") as url,
    ):
        body = {"model": "tandem", "prompt": "x", "max_tokens": 15000, "ignore_eos": True}
        with requests.post(
            f"{url}/v1/completions", json={**body, "stream": True}, stream=True, timeout=TIMEOUT
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            for child in psutil.Process(server.pid).children(recursive=True):
                if "stub" in child.name():
                    child.kill()
            killed_at = time.monotonic()
            *_, last = [line for line in lines if line]
            assert time.monotonic() - killed_at < 5
        assert (
            "the model's process is dead" in json.loads(last[len(b"data: ") :])["error"]["message"]
        )
        wait_until(lambda: requests.get(f"{url}/health", timeout=TIMEOUT).status_code == 503, 7)
        answer = requests.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT)
        assert answer.status_code == 503


def test_pings_count_as_no_requests(server: TritonServer) -> None:
    from tandem_client import AsyncClient

    async def ask() -> bool:
        async with AsyncClient(server.grpc_url) as client:
            return all([await client.is_ready() for _ in range(5)])

    before = metric(server, "request_failure_total")
    assert asyncio.run(ask())
    assert metric(server, "request_failure_total") == before
