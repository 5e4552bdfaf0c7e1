"""Nothing that a client sends holds up, harms or shows itself to the others."""

from __future__ import annotations

import json
import queue
import threading
import time
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from stream import TIMEOUT
from tandem import Engine
from tandem_runtime.server import TritonServer
from tensors import COMMON, offline, tensors

pytestmark = pytest.mark.server

GOOD = {"text_input": "one two three", **COMMON}
NUM_GOOD = 24


def post(server: TritonServer, body: bytes) -> requests.Response:
    url = f"{server.http_url}/v2/models/tandem/generate"
    return requests.post(url, data=body, timeout=TIMEOUT)


def refusal(server: TritonServer, **values: Any) -> str:
    """The message of a request that is refused."""
    response = post(server, json.dumps({"text_input": "x", **values}).encode())
    assert response.status_code == 400, response.text
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return str(response.json()["error"])


def test_a_request_that_isnt_utf8_harms_no_neighbour(server: TritonServer, engine: Engine) -> None:
    """Requests of one call of `execute()`, some of them with such an id or parameter."""
    expected = offline(engine)
    bad = [b'{"text_input": "x", "id": "\xff"}', b'{"text_input": "x", "cache_salt": "\xfe"}']
    good = json.dumps(GOOD).encode()
    answers: queue.Queue[tuple[bytes, requests.Response]] = queue.Queue()

    def send(body: bytes) -> None:
        answers.put((body, post(server, body)))

    bodies = [good, bad[0], good, bad[1]] * (NUM_GOOD // 2)
    threads = [threading.Thread(target=send, args=[body]) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while not answers.empty():
        body, answer = answers.get()
        if body == good:
            assert answer.status_code == 200, answer.text
            assert answer.json()["text_output"] == expected
        else:
            assert answer.status_code == 400
            assert "UTF-8" in answer.text
            assert ".py" not in answer.text


def test_several_prompts_in_one_tensor_are_refused(server: TritonServer) -> None:
    rows = np.array([[1, 2], [3, 4]], dtype=np.int32)
    tensor = grpcclient.InferInput("input_ids", rows.shape, np_to_triton_dtype(rows.dtype))
    tensor.set_data_from_numpy(rows)
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer("tandem", [tensor])
        error = answers.get(timeout=TIMEOUT)
    assert isinstance(error, InferenceServerException)
    assert "input_ids has the shape [2, 2]: send each prompt as a request" in str(error)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop_token_ids": "[" * 100_000}, "stop_token_ids holds more than 65536 values"),
        ({"logit_bias": '{"a":' * 100_000}, "logit_bias holds more than 65536 values"),
        ({"stop": "\ud800"}, "stop must be a list of strings"),
        ({"bad_words": ["\ud800"]}, "bad_words must be a list of strings"),
        ({"cache_salt": "\udfff"}, "cache_salt must be a string"),
        ({"drafter": "x" * 2_000_000}, "unknown drafter 'xxx"),
        ({"n": 10**300}, "n must be a whole number"),
        ({"use_beam_search": "x" * 2_000_000}, "use_beam_search must be true or false, got 'xxx"),
    ],
)
def test_what_cant_be_read_is_refused_by_name_and_briefly(
    server: TritonServer, values: dict[str, Any], message: str
) -> None:
    said = refusal(server, sampling_parameters=json.dumps(values))
    assert message in said
    assert len(said) < 2100


@pytest.mark.parametrize("token_id", [-1, 2**31 - 1])
def test_token_ids_out_of_range_are_refused_by_name(server: TritonServer, token_id: int) -> None:
    """Also where the text that they stand for is asked for."""
    values = {"input_ids": [5, token_id], "exclude_input_in_output": False}
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer("tandem", tensors(values))
        error = answers.get(timeout=TIMEOUT)
    assert f"prompt token ids must be whole numbers below 384, got {token_id}" in str(error)


@pytest.mark.parametrize(
    "values",
    [
        {"text_input": "a " * 4_000_000},
        {"text_input": "a " * 1_000_000, "n": 64},
        {"text_input": None, "messages": json.dumps([{"role": "user", "content": "a"}] * 100_000)},
    ],
    ids=["8 MB", "2 MB, 64 times", "100,000 messages"],
)
def test_a_long_text_holds_nobody_up(server: TritonServer, values: dict[str, Any]) -> None:
    """First tokens of others come while it is read and refused."""
    body = {name: value for name, value in {"text_input": "x", **values}.items() if value}
    statuses: list[int] = []
    attack = threading.Thread(
        target=lambda: statuses.append(post(server, json.dumps(body).encode()).status_code)
    )
    good = json.dumps({**GOOD, "max_tokens": 1}).encode()
    post(server, good)
    alone = max(_seconds(server, good) for _ in range(5))
    attack.start()
    beside = [_seconds(server, good) for _ in range(10)]
    attack.join()
    assert statuses == [400]
    # Below 0.3 s in several runs here; 13 s and more when it was read where all are admitted.
    assert max(beside) < alone + 1.0


def test_a_guide_that_would_overflow_a_stack_harms_nobody(
    server: TritonServer, engine: Engine
) -> None:
    """3,000 rules that lead to one another are compiled; as many as may be sent are refused."""
    expected = offline(engine)
    for count in (3000, 7000):
        rules: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count)}
        rules[f"d{count}"] = {"const": "a"}
        guide = {"json": {"$defs": rules, "$ref": "#/$defs/d0"}}
        sampling = json.dumps({"max_tokens": 3, "structured_outputs": guide})
        answer = post(
            server, json.dumps({"text_input": "x", "sampling_parameters": sampling}).encode()
        )
        assert answer.status_code == (200 if count == 3000 else 400), answer.text
        good = post(server, json.dumps(GOOD).encode())
        assert good.json()["text_output"] == expected


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        ({"json": {"$ref": "#"}}, "json can't be used as a guide: no text matches it"),
        ({"regex": r"[^\s\S]"}, "regex can't be used as a guide: no text matches it"),
        ({"grammar": "start: \n"}, "grammar can't be used as a guide: only the empty text"),
        (
            {"grammar": "start: " + " | ".join(f'"w{n}"' for n in range(9000))},
            "grammar can't be used as a guide: Parser Error: Current row has",
        ),
    ],
)
def test_guides_that_nothing_can_match_are_refused_with_the_reason(
    server: TritonServer, guide: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(server, sampling_parameters=json.dumps({"structured_outputs": guide}))


def test_guides_that_take_long_hold_nobody_up(server: TritonServer) -> None:
    """More than are read at once; each is given up after two seconds."""
    rules = "".join(f"T{n}: T{n + 1} T{n + 1}\n" for n in range(3000))
    grammar = f'start: T0\n{rules}T3000: "a"\n'
    sampling = json.dumps({"structured_outputs": {"grammar": grammar}})
    bad = json.dumps({"text_input": "x", "sampling_parameters": sampling}).encode()
    good = json.dumps({**GOOD, "max_tokens": 1}).encode()
    alone = max(_seconds(server, good) for _ in range(5))
    answers: list[requests.Response] = []
    attacks = [threading.Thread(target=lambda: answers.append(post(server, bad))) for _ in range(4)]
    for attack in attacks:
        attack.start()
    beside = [_seconds(server, good) for _ in range(10)]
    assert len(answers) < 4  # they were all answered beside attacks
    for attack in attacks:
        attack.join()
    assert max(beside) < alone + 1.0
    assert [answer.status_code for answer in answers] == [400] * 4
    assert all("reading it takes longer than 2 s" in answer.text for answer in answers)


def _seconds(server: TritonServer, body: bytes) -> float:
    started = time.monotonic()
    assert post(server, body).status_code == 200
    return time.monotonic() - started
