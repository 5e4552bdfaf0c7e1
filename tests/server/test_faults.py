"""What goes wrong in service: hostile requests, dying clients, deadlines, overload, failing steps.

Whatever it is, every request gets its one end, no good one is disturbed, and no block is lost.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from http_process import post_from_a_process
from repositories import write_repository
from stream import TIMEOUT, Stream, metric, wait_until
from tandem import Engine, SamplingParams
from tandem_runtime.paths import ROOT
from tandem_runtime.server import TritonServer

NUM_HOSTILE = 800
GOOD: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30}

# --- requests of which each is wrong in some way

NUMBERS = st.sampled_from([-1e30, -7, 1e30, 2**63, 2**64, 10**30, float("nan"), float("inf")])
JUNK = st.one_of(
    st.text(min_size=1, max_size=30).filter(lambda text: text.strip("0123456789.+-eE_ ") != ""),
    st.just([]),
    st.just({}),
    st.just([None]),
    st.just({"a": [1]}),
    st.just([[1, 2], [3]]),
)
WRONG_NUMBERS = {
    "max_tokens": st.one_of(NUMBERS, JUNK, st.sampled_from([-1, 1.5])),
    "min_tokens": st.one_of(NUMBERS, JUNK, st.just(2**31)),
    "temperature": st.one_of(NUMBERS, JUNK, st.sampled_from([-0.01, 101])),
    "top_k": st.one_of(NUMBERS, JUNK, st.sampled_from([-2, 2.5])),
    "top_p": st.one_of(NUMBERS, JUNK, st.sampled_from([-0.01, 1.01])),
    "min_p": st.one_of(NUMBERS, JUNK, st.sampled_from([-0.01, 1.01])),
    "repetition_penalty": st.one_of(NUMBERS, JUNK, st.just(0)),
    "presence_penalty": st.one_of(NUMBERS, JUNK, st.just(2.1)),
    "frequency_penalty": st.one_of(NUMBERS, JUNK, st.just(-2.1)),
    "seed": st.one_of(st.sampled_from([-(2**63) - 1, 2**64, 1.5, 10**30, float("nan")]), JUNK),
    "n": st.one_of(NUMBERS, JUNK, st.sampled_from([0, 65])),
    "logprobs": st.one_of(NUMBERS, JUNK, st.just(21)),
    "prompt_logprobs": st.one_of(NUMBERS, JUNK, st.just(21)),
    "num_speculative_tokens": st.one_of(st.sampled_from([-1, 0.5, float("nan")]), JUNK),
    "stop": st.sampled_from([["x"] * 10_000, [1], ["y" * 2000], {"a": 1}, 7]),
    "bad_words": st.sampled_from([["x"] * 10_000, [None], 0.5]),
    "stop_token_ids": st.sampled_from([[384], [-1], list(range(200)), ["x"], [1.5]]),
    "logit_bias": st.sampled_from(
        [{"384": 1}, {"-1": 1}, {"5": 101}, {"5": "x"}, [1], "[", {"x": 1}]
    ),
    "structured_outputs": st.sampled_from(
        [
            {},
            {"json": "{"},
            {"regex": "("},
            {"choice": []},
            {"json": {}, "regex": "a"},
            "x",
            {"a": "b"},
        ]
    ),
    "drafter": st.one_of(
        st.text(min_size=1, max_size=20).map(lambda text: f"no{text}"), st.just(7)
    ),
    "stream": st.sampled_from(["perhaps", 2, [], {}]),
    "beam_width": st.sampled_from([0, 2, "x"]),
}
WRONG_OPTIONS = st.one_of(
    *(values.map(lambda value, name=name: {name: value}) for name, values in WRONG_NUMBERS.items())
)
NOT_JSON_OBJECTS = st.one_of(
    st.sampled_from(["{", "[1]", '"x"', "null", "1", "{'a': 1}", "[" * 100_000, "NaN", "\x00"]),
    st.text(min_size=1, max_size=40).filter(lambda text: not text.strip().startswith("{")),
)
HOSTILE = st.one_of(
    WRONG_OPTIONS.map(
        lambda options: {"text_input": "x", "sampling_parameters": json.dumps(options)}
    ),
    NOT_JSON_OBJECTS.map(lambda text: {"text_input": "x", "sampling_parameters": text}),
    st.sampled_from(["", "x" * 16_000, "y" * 200_000]).map(lambda text: {"text_input": text}),
    st.sampled_from(
        [{}, {"top_k": 3}, {"input_ids": [999]}, {"text_input": "x", "input_ids": [7]}]
    ),
    st.sampled_from(["[", "7", "[7]", '[{"role": 1}]', "\x00"]).map(
        lambda text: {"messages": text}
    ),
)


def post(server: TritonServer, body: Any, model: str = "tandem") -> requests.Response:
    data = json.dumps(body)
    url = f"{server.http_url}/v2/models/{model}/generate"
    return requests.post(url, data=data, timeout=TIMEOUT)


def offline(engine: Engine, prompt: str, **options: Any) -> str:
    output = next(engine.generate([prompt], SamplingParams(**options), drafter="none"))
    assert output.text is not None
    return output.text


def is_idle(server: TritonServer, model: str = "tandem") -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_blocks_used")
    return all(metric(server, name, model) == 0 for name in names)


def stub_bytes() -> int:
    """Memory of all the servers' stub processes, which hold the engines."""
    children = psutil.Process().children(recursive=True)
    return sum(c.memory_info().rss for c in children if "stub" in c.name())


@pytest.mark.slow
def test_hostile_requests_disturb_nobody(server: TritonServer, engine: Engine) -> None:
    expected = offline(engine, "a good one", **GOOD)
    done, wrong_texts, num_good = threading.Event(), [], 0

    def send_good_ones() -> None:
        nonlocal num_good
        while not done.is_set():
            answer = post(server, {"text_input": "a good one", **GOOD})
            num_good += 1
            if answer.status_code != 200 or answer.json()["text_output"] != expected:
                wrong_texts.append(answer.text)

    session = requests.Session()
    url = f"{server.http_url}/v2/models/tandem/generate"

    @settings(
        max_examples=NUM_HOSTILE,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(HOSTILE)
    def attack(body: dict[str, Any]) -> None:
        nonlocal num_hostile
        answer = session.post(url, data=json.dumps(body), timeout=TIMEOUT)
        num_hostile += 1
        assert answer.status_code == 400, (body, answer.status_code, answer.text)
        assert answer.json()["error"]

    num_hostile = 0
    good = [threading.Thread(target=send_good_ones) for _ in range(2)]
    for thread in good:
        thread.start()
    for number in range(100):  # what was allocated once and for all doesn't count
        session.post(url, data=json.dumps({"text_input": "x", "top_p": 2 + number}))
    before = stub_bytes()
    try:
        attack()
    finally:
        done.set()
        for thread in good:
            thread.join()
    assert num_hostile >= NUM_HOSTILE
    assert wrong_texts == []
    assert num_good > 20
    wait_until(lambda: is_idle(server))
    assert stub_bytes() < before * 1.03 + 8 * 2**20


def test_invalid_utf8_in_every_text(server: TritonServer) -> None:
    with Stream(server) as stream:
        for number in range(20):
            stream.send(f"{number}", b"\xff\xfe" + bytes([number]))
        responses = stream.responses(20)
    assert all("not valid UTF-8" in response.error for response in responses.values())


CLIENT = """
import random, sys, time
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from stream import Stream
stream = Stream(SimpleNamespace(grpc_url=sys.argv[2]))
for number in range(int(sys.argv[3])):
    stream.send(str(number), "a prompt " * (1 + 400 * (number % 2)), max_tokens=12000,
                ignore_eos=True, temperature=0.0)
print("sent", flush=True)
time.sleep(60)
"""


def start_client(server: TritonServer, num_requests: int) -> subprocess.Popen[bytes]:
    folder = str(ROOT / "tests" / "server")
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, folder, server.grpc_url, str(num_requests)],
        stdout=subprocess.PIPE,
    )


@pytest.mark.slow
def test_clients_killed_in_every_state(server: TritonServer, engine: Engine) -> None:
    """Queued, prefilling and decoding requests die with their clients; a good one goes through."""
    rng = random.Random(0)
    expected = offline(engine, "still here", **GOOD)
    for _ in range(3):
        clients = [start_client(server, 7) for _ in range(2)]
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == b"sent\n"
        time.sleep(rng.uniform(0, 0.6))
        for client in clients:
            client.kill()
            client.wait()
            client.stdout.close()  # type: ignore[union-attr]
        killed_at = time.monotonic()
        wait_until(lambda: is_idle(server), seconds=10)
        assert time.monotonic() - killed_at < 10
        assert post(server, {"text_input": "still here", **GOOD}).json()["text_output"] == expected


def test_a_cancelled_request_ends_within_200_ms(server: TritonServer) -> None:
    """Decoding, and waiting for one of the eight slots; the metrics lag up to 0.5 s behind."""
    endless = {"max_tokens": 12000, "ignore_eos": True}
    streams = [Stream(server) for _ in range(9)]
    for number, stream in enumerate(streams):
        stream.send(str(number), "on and on", **endless)
    wait_until(lambda: metric(server, "num_requests_running") == 8)
    cancelled = metric(server, "request_failure_total")
    started = time.monotonic()
    streams[0].close()
    streams[8].close()
    wait_until(lambda: metric(server, "request_failure_total") >= cancelled + 1)
    assert time.monotonic() - started < 0.2 + 0.5 + 0.1
    for stream in streams[1:8]:
        stream.close()
    wait_until(lambda: is_idle(server), seconds=5)


def test_closing_an_http_stream_cancels_its_request(server: TritonServer) -> None:
    body = {"text_input": "on and on", "stream": True, "max_tokens": 12000, "ignore_eos": True}
    url = f"{server.http_url}/v2/models/tandem/generate_stream"
    with post_from_a_process(url, body) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith(b"data: ")
        client.kill()
    wait_until(lambda: is_idle(server), seconds=5)


def test_a_timeout_holds_in_the_queue_too(server: TritonServer, engine: Engine) -> None:
    """Eight fill the slots; of those behind them, the ones with a timeout end."""
    with Stream(server) as running, Stream(server) as late:
        for number in range(8):
            running.send(str(number), "on and on", max_tokens=12000, ignore_eos=True)
        wait_until(lambda: metric(server, "num_requests_running") == 8)
        started = time.monotonic()
        for number in range(12):
            late.send(str(number), "late", timeout_us=500_000, **GOOD)
        errors = [response.error for response in late.responses(12).values()]
        assert time.monotonic() - started < 5
    assert len(errors) == 12
    assert all("timeout" in error.lower() for error in errors)
    wait_until(lambda: is_idle(server), seconds=5)


FAULTY = '''
"""A model whose steps fail when a prompt says so."""

import importlib.util
import sys
import threading
from pathlib import Path

import torch

source = Path({root!r}) / "python_backend"
sys.path.insert(0, str(source))
spec = importlib.util.spec_from_file_location("tandem_model", source / "model.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


loaders = set()


class TritonPythonModel(module.TritonPythonModel):
    @staticmethod
    def _load_engine(args):
        loaders.add(threading.get_ident())
        return module.TritonPythonModel._load_engine(args)

    def initialize(self, args):
        super().initialize(args)
        verify, bad, worse = self._engine.verify, *self._engine.tokenizer("~^")["input_ids"]

        def failing(batch):
            assert loaders == {{threading.get_ident()}}, "a second team of OpenMP threads"
            sequences = [s.sequence for s in batch]
            prompts = {{t for s in sequences for t in s.token_ids[: s.num_prompt_tokens]}}
            if worse in prompts:
                raise RuntimeError("injected for good")
            if bad in prompts and not self.__dict__.setdefault("_failed", False):
                self._failed = True
                raise torch.OutOfMemoryError("injected")
            if bad not in prompts:
                self._failed = False
            return verify(batch)

        self._engine.verify = failing
'''


@pytest.fixture
def faulty(tmp_path: Path, tiny_verifier: Path) -> Iterator[TritonServer]:
    """A server of its own, whose model fails on demand."""
    directory = write_repository(tmp_path / "repository", tiny_verifier)
    model = directory / "tandem"
    config = (model / "config.pbtxt").read_text()
    (model / "config.pbtxt").write_text(config.replace('backend: "tandem"', 'backend: "python"'))
    (model / "1" / "model.py").write_text(FAULTY.format(root=str(ROOT)))
    with TritonServer(directory) as server:
        yield server
    shutil.rmtree(directory)


@pytest.mark.slow
def test_a_failed_step_ends_its_requests_and_the_engine_serves_on(
    faulty: TritonServer, engine: Engine
) -> None:
    expected = offline(engine, "good", **GOOD)
    with Stream(faulty) as stream:
        for number in range(6):
            stream.send(f"long {number}", "good", max_tokens=3000, ignore_eos=True)
        wait_until(lambda: metric(faulty, "num_requests_running") == 6)
        stream.send("bad", "this one fails ~", max_tokens=5)
        errors = [r.error for r in stream.responses(7).values() if r.num_finals]
        assert len(errors) == 7
        assert all(error.startswith("INTERNAL: a step of the engine failed") for error in errors)
        assert all("injected" in error for error in errors)
        wait_until(lambda: is_idle(faulty))
        stream.send("after", "good", **GOOD)
        assert stream.responses(1)["after"].text == expected
    assert metric(faulty, "request_failure_total") == 7


@pytest.mark.slow
def test_an_engine_that_keeps_failing_says_so(faulty: TritonServer) -> None:
    with Stream(faulty) as stream:
        for number in range(3):
            stream.send(str(number), "this never works ^", max_tokens=5)
            (response,) = stream.responses(1).values()
            assert "injected for good" in response.error
        stream.send("late", "good", **GOOD)
        (response,) = stream.responses(1).values()
        assert response.error.startswith("UNAVAILABLE: the engine failed in a step")
        assert is_idle(faulty)
