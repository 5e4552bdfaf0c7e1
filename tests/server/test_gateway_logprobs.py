"""Log probabilities through the gateway and a real server, against the model's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from openai import OpenAI

from running_gateway import running_gateway
from stream import TIMEOUT
from tandem import Engine, SamplingParams
from tandem_runtime.server import TritonServer
from tensors import COMMON, PROMPT, offline
from tiny_models import load_reference


@pytest.fixture(scope="module")
def url(server: TritonServer) -> Iterator[str]:
    with running_gateway(server) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_stop_and_logprobs(client: OpenAI, engine: Engine) -> None:
    text = offline(engine)
    stop = re.findall("[!-~]", text)[1]
    answer = client.completions.create(
        model="tandem", prompt=PROMPT, stop=stop, logprobs=2, **COMMON
    )
    choice = answer.choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or []) == answer.usage.completion_tokens
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs or [])
    assert (choice.logprobs.text_offset or [])[:2] == [0, len((choice.logprobs.tokens or "")[0])]


@pytest.mark.parametrize("limit", [0, 1])
def test_likelihoods_are_the_models_own(
    client: OpenAI, engine: Engine, tiny_verifier: Path, limit: int
) -> None:
    """As lm-eval asks for them: of a continuation's tokens, and whether each is the likeliest."""
    texts = [PROMPT + each for each in (" four five", " \U0001f600!", "")]
    prompts: list[list[int]] = [engine.tokenizer(text)["input_ids"] for text in texts]
    answer = client.completions.create(
        model="tandem", prompt=prompts, echo=True, logprobs=1, max_tokens=limit, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == limit * len(prompts)
    model = load_reference(tiny_verifier)
    for ids, text, choice in zip(prompts, texts, answer.choices, strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)[:-1]
        found = choice.logprobs
        assert found is not None
        assert len(found.tokens or []) == len(ids) + limit
        assert choice.text.startswith(text)
        assert choice.finish_reason == "length"
        scores = (found.token_logprobs or [])[: len(ids)]
        assert scores[0] is None
        expected = rows.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        assert scores[1:] == pytest.approx(expected.tolist(), abs=1e-4)
        start = len(PROMPT)
        assert sum(scores[start:]) == pytest.approx(expected[start - 1 :].sum().item(), abs=1e-3)
        tops = (found.top_logprobs or [])[1 : len(ids)]
        best = [max(top.values()) for top in tops if top is not None]
        assert best == pytest.approx(rows.amax(dim=-1).tolist(), abs=1e-4)
        offsets = (found.text_offset or [])[: len(ids)]
        # A token is a byte, and the place of a part of a character is the character's.
        before = [text.encode()[:end].decode(errors="ignore") for end in range(len(ids))]
        assert offsets == [len(each) for each in before]


def test_no_token_begins_behind_the_text(client: OpenAI, engine: Engine) -> None:
    """Not even those of a stop string, which the text is cut before."""
    text = offline(engine)
    stop = re.findall("[!-~]{2}", text)[0]
    answer = client.completions.create(
        model="tandem", prompt=PROMPT, logprobs=0, stop=stop, **COMMON
    ).choices[0]
    assert answer.text == text[: text.index(stop)]
    assert answer.logprobs is not None
    offsets = answer.logprobs.text_offset or []
    assert max(offsets) == len(answer.text)
    assert offsets.count(len(answer.text)) > 1


def test_those_of_a_prompt_alone(url: str, engine: Engine) -> None:
    """vLLM's extension, for texts and for chats, which generate nothing if they are to."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    prompt = "<turn>user:hi<end><turn>assistant:"
    body = {"max_tokens": 0, "prompt_logprobs": 1}
    messages = [{"role": "user", "content": "hi"}]
    for path, model, text, more in (
        (f"{url}/v1/completions", "tandem", PROMPT, {"prompt": PROMPT}),
        (f"{url}/v1/chat/completions", "short_queue", prompt, {"messages": messages}),
    ):
        answer = requests.post(
            path,
            json={"model": model, **body, **more},
            timeout=TIMEOUT,
        ).json()
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        assert (choice.get("text") or choice.get("message", {}).get("content") or "") == ""
        (output,) = engine.generate([text], params)
        first, *others = choice["prompt_logprobs"]
        assert first is None
        for entry, found in zip(others, output.prompt_logprobs, strict=True):
            assert {int(each) for each in entry} == {found.token_id, found.top[0][0]}
            own = entry[str(found.token_id)]
            assert own["logprob"] == pytest.approx(found.logprob, abs=1e-4)
            assert own["rank"] == found.rank
