"""The backend inside a real Triton server, driven by Triton's own clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from repositories import write_repository
from stream import TIMEOUT, Stream, metric, wait_until
from tandem import Engine, SamplingParams
from tandem_runtime.server import EXIT_TIMEOUT_SECONDS, ServerError, TritonServer

SHUTTING_DOWN = "UNAVAILABLE: the server is shutting down"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40}


def offline(engine: Engine, prompt: str, **options: Any) -> tuple[str, int]:
    """The text and number of tokens that the engine gives without a server, drafting nothing."""
    options.pop("drafter", None)
    output = next(engine.generate([prompt], SamplingParams(**options), drafter="none"))
    assert output.text is not None
    return output.text, len(output.token_ids)


def post(server: TritonServer, verb: str, body: Any, model: str = "tandem") -> requests.Response:
    url = f"{server.http_url}/v2/models/{model}/{verb}"
    return requests.post(url, json=body, timeout=TIMEOUT)


def is_idle(server: TritonServer, model: str = "tandem") -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_blocks_used")
    return all(metric(server, name, model) == 0 for name in names)


def test_grpc_stream_gives_the_engines_text(server: TritonServer, engine: Engine) -> None:
    with Stream(server) as stream:
        stream.send("a", "hello world", **GREEDY)
        response = stream.responses(1)["a"]
    text, num_tokens = offline(engine, "hello world", **GREEDY)
    assert response.text == text
    assert response.counts["num_output_tokens"] == num_tokens
    assert response.counts["num_input_tokens"] == len("hello world")
    assert response.finish_reason in ("stop", "length")
    assert len(response.texts) > 1
    assert "" not in response.texts[:-1]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_grpc_stream_gives_the_same_text_with_and_without_speculation(
    server: TritonServer, engine: Engine, temperature: float
) -> None:
    options = {"temperature": temperature, "max_tokens": 60, "seed": 11, "top_k": 5}
    with Stream(server) as stream:
        for drafter in ("none", "ngram"):
            stream.send(drafter, "abcabcabcabc", drafter=drafter, **options)
        responses = stream.responses(2)
    assert responses["ngram"].text == responses["none"].text
    assert responses["ngram"].text == offline(engine, "abcabcabcabc", **options)[0]
    assert responses["ngram"].counts["num_draft_tokens"] > 0
    assert responses["none"].counts["num_draft_tokens"] == 0


def test_without_stream_there_is_one_response(server: TritonServer, engine: Engine) -> None:
    with Stream(server) as stream:
        stream.send("a", "one answer", stream=False, **GREEDY)
        response = stream.responses(1)["a"]
    text, num_tokens = offline(engine, "one answer", **GREEDY)
    assert response.texts == [text]
    assert response.counts["num_output_tokens"] == num_tokens


def test_http_generate_takes_parameters(server: TritonServer, engine: Engine) -> None:
    text, num_tokens = offline(engine, "over http", **GREEDY)
    for body in (
        {"text_input": "over http", **GREEDY},
        {"text_input": "over http", "parameters": GREEDY},
        {"text_input": "over http", "sampling_parameters": json.dumps(GREEDY)},
    ):
        answer = post(server, "generate", body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["text_output"] == text
        assert answer.json()["num_output_tokens"] == num_tokens


def test_http_generate_stream_gives_server_sent_events(
    server: TritonServer, engine: Engine
) -> None:
    body = {"text_input": "over http", "stream": True, **GREEDY}
    lines = post(server, "generate_stream", body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert (
        "".join(event["text_output"] for event in events)
        == offline(engine, "over http", **GREEDY)[0]
    )
    assert [event["finish_reason"] for event in events[:-1]] == [""] * (len(events) - 1)


def test_tensors_win_over_sampling_parameters_and_those_over_request_parameters(
    server: TritonServer,
) -> None:
    sampling = {"max_tokens": "5", "seed": "7", "include_stop_str_in_output": True, "n": 1}
    body = {
        "text_input": "x",
        "max_tokens": 3,  # an input of the model, so HTTP makes a tensor of it
        "include_stop_str_in_output": "maybe",  # none, so it becomes a parameter
        "sampling_parameters": json.dumps({"ignore_eos": True, **sampling}),
    }
    answer = post(server, "generate", body).json()
    assert answer["num_output_tokens"] == 3
    assert answer["seed"] == 7


def test_32_clients_against_8_slots_share_steps(server: TritonServer, engine: Engine) -> None:
    wait_until(lambda: is_idle(server))
    steps = metric(server, "engine_steps_total")
    check_32_clients(server, engine)
    # Alone, each needs 100 steps; eight at a time need an eighth of 3,200 in all.
    assert metric(server, "engine_steps_total") - steps < 3200 / 2


def test_with_a_core_to_spare_responses_leave_during_the_steps(
    private_repository: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    with TritonServer(private_repository) as server:
        check_32_clients(server, engine)
        # A thread that waits for others keeps its core for a moment only.
        assert "GOMP_SPINCOUNT = '1000'" in server.log_file.read_text(encoding="utf-8")


def test_threads_that_read_give_way_to_steps(server: TritonServer) -> None:
    """Both are busy with this; where there are too few cores the steps have them."""
    with Stream(server) as stream:
        stream.send("it", "a text", max_tokens=20, guided_decoding={"regex": "[0-9]{3}"})
        assert len(stream.responses(1)["it"].text) == 3
    children = psutil.Process().children(recursive=True)
    (stub,) = (
        child
        for child in children
        if "stub" in child.name() and any("/tandem/1" in each for each in child.cmdline())
    )
    stats = [path.read_text() for path in Path(f"/proc/{stub.pid}/task").glob("*/stat")]
    nice = Counter(int(stat.rpartition(")")[2].split()[16]) for stat in stats)
    assert nice.keys() == {0, 10}
    assert nice[10] >= 2  # for guides there are others
    checkers = [child for child in stub.children() if "check_guides" in " ".join(child.cmdline())]
    assert [child.nice() for child in checkers] == [15] * len(checkers) != []


def check_32_clients(server: TritonServer, engine: Engine) -> None:
    """Each gets its own answer, ended once."""
    options = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True}
    prompts = [f"prompt number {i} " * (i % 5 + 1) for i in range(32)]
    streams = [Stream(server) for _ in prompts]
    for stream, prompt in zip(streams, prompts, strict=True):
        stream.send(prompt, prompt, drafter="none", **options)
    responses = {}
    for stream in streams:
        responses |= stream.responses(1)
        stream.close()
    wait_until(lambda: is_idle(server))
    expected = engine.generate(prompts, SamplingParams(**options), drafter="none")
    for prompt, output in zip(prompts, expected, strict=True):
        assert responses[prompt].text == output.text
        assert responses[prompt].num_finals == 1


def test_a_full_queue_refuses_and_nothing_hangs(server: TritonServer, engine: Engine) -> None:
    options = {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True}
    long = options | {"max_tokens": 1500}
    short_text, long_text = (offline(engine, "busy", **each)[0] for each in (options, long))
    with Stream(server, "short_queue") as running, Stream(server, "short_queue") as late:
        for number in range(8):
            running.send(str(number), "busy", **long)
        wait_until(lambda: metric(server, "num_requests_running", "short_queue") == 8)
        for number in range(32):
            late.send(str(number), "busy", **options)
        wait_until(lambda: metric(server, "num_requests_waiting", "short_queue") == 4)
        first = list(running.responses(8).values())
        responses = [*first, *late.responses(32).values()]
    assert [r.text for r in first] == [long_text] * 8
    refused = [r for r in responses if r.error]
    served = [r for r in responses if not r.error]
    assert len(refused) == 32 - 4
    assert all("UNAVAILABLE: the queue is full, 4 wait" in r.error for r in refused)
    assert [r.text for r in served[8:]] == [short_text] * 4
    wait_until(lambda: is_idle(server, "short_queue"))


def test_the_blocks_of_a_killed_client_come_back(server: TritonServer) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from types import SimpleNamespace\n"
        "from stream import Stream\n"
        "stream = Stream(SimpleNamespace(grpc_url=sys.argv[2]))\n"
        f"stream.send('a', 'a long story', max_tokens={15000}, temperature=0.0, ignore_eos=True)\n"
        "stream.events.get(timeout=60)\n"
        "print('streaming', flush=True)\n"
        "stream.events.join()\n"
        "import time; time.sleep(600)\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), server.grpc_url],
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    with client.stdout:
        assert client.stdout.readline() == b"streaming\n"
        wait_until(lambda: metric(server, "kv_cache_blocks_used") > 0)
        client.send_signal(signal.SIGKILL)
        client.wait()
    wait_until(lambda: is_idle(server), seconds=5)


def test_a_cancelled_stream_leaves_the_others_alone(server: TritonServer, engine: Engine) -> None:
    options = {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True}
    with Stream(server) as kept:
        cancelled = Stream(server)
        cancelled.send("gone", "a long story", **options | {"max_tokens": 15000})
        kept.send("kept", "a short story", **options)
        cancelled.events.get(timeout=TIMEOUT)
        cancelled.close()
        response = kept.responses(1)["kept"]
    assert response.text == offline(engine, "a short story", **options)[0]
    wait_until(lambda: is_idle(server), seconds=5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 2.5}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"drafter": "eagle"}, "eagle"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens"),
        ({"ignore_eos": "perhaps"}, "ignore_eos"),
    ],
)
def test_a_wrong_parameter_is_named(
    server: TritonServer, options: dict[str, Any], named: str
) -> None:
    with Stream(server) as stream:
        stream.send("wrong", "hello", **options)
        (response,) = stream.responses(1).values()
    assert named in response.error


@pytest.mark.parametrize(
    ("prompt", "named"), [("", "empty"), (b"\xff\xfe", "UTF-8"), ("x" * 20000, "max_model_len")]
)
def test_a_wrong_prompt_is_refused(server: TritonServer, prompt: str | bytes, named: str) -> None:
    with Stream(server) as stream:
        stream.send("wrong", prompt)
        (response,) = stream.responses(1).values()
    assert named in response.error


def test_a_wrong_parameter_is_a_client_error_over_http(server: TritonServer) -> None:
    for body in (
        {"text_input": "x", "top_p": 2},
        {"text_input": "x", "sampling_parameters": "{"},
        {"text_input": "x", "sampling_parameters": "[]"},
    ):
        answer = post(server, "generate", body)
        assert answer.status_code == 400, answer.text
        assert "top_p" in answer.json()["error"] or "sampling_parameters" in answer.json()["error"]


def test_a_wrong_request_leaves_its_batch_alone(server: TritonServer, engine: Engine) -> None:
    with Stream(server) as stream:
        for number in range(12):
            options = {"top_k": -2} if number % 3 == 0 else GREEDY
            stream.send(str(number), "hello", **options)
        responses = stream.responses(12)
    text = offline(engine, "hello", **GREEDY)[0]
    served = [r for r in responses.values() if not r.error]
    assert len(served) == 8
    assert all(r.text == text for r in served)


@pytest.mark.slow
def test_shutdown_ends_every_stream(private_repository: Path) -> None:
    with TritonServer(private_repository) as server:
        streams = [Stream(server) for _ in range(10)]
        for number, stream in enumerate(streams):
            # Eight run and two wait.
            stream.send(str(number), "endless", max_tokens=15000, ignore_eos=True)
        wait_until(lambda: metric(server, "num_requests_running") == 8)
        started = time.monotonic()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        for stream in streams:
            responses = stream.responses(1)
            # An open stream would hold the server up until its exit timeout, and so does one in
            # five or so that is cancelled in the instant of its last response.
            stream.close(cancel=False)
            assert [r.error for r in responses.values() if r.num_finals] == [SHUTTING_DOWN]
        stopping.join()
        assert time.monotonic() - started < EXIT_TIMEOUT_SECONDS


@pytest.mark.slow
def test_what_is_wrong_with_each_model_is_named(tmp_path: Path, tiny_verifier: Path) -> None:
    """A key of model.json, and sizes of queues, in one repository."""
    sizes = ("many", "-1", "inf")
    for size in sizes:
        write_repository(tmp_path, tiny_verifier, f"size{size}", max_queue_size=size)
    write_repository(tmp_path, tiny_verifier, "key", verifer="x")
    with pytest.raises(ServerError) as failure:
        TritonServer(tmp_path).__enter__()
    said = str(failure.value)
    assert "unknown key 'verifer'; allowed: verifier, dtype" in said
    for size in sizes:
        assert f"max_queue_size must be a number from 0, got '{size}'" in said
