"""The client without a server: what it sends, how it reads, and the command's exit status."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from rich.console import Console
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

import tandem_client
from tandem_client import (
    AsyncClient,
    Chunk,
    Client,
    Completion,
    Options,
    Prompt,
    RequestError,
    ServerUnavailableError,
)
from tandem_client.cli import main, printer, summary
from tandem_client.options import make_metadata
from tandem_client.protocol import Exchange, ask_for_text, make_request, refusal
from tandem_client.stats import Sample, compare, render

CHUNK = Chunk(
    "naïve 🙂 text",
    index=2,
    stop_reason="END",
    token_ids=(5, 6, 7, 8),
    is_accepted_draft=(True, True, True, False),
    logprobs=({"5": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}},),
    seed=2**64 - 1,
    num_cached_tokens=2,
    time_to_first_token=0.5,
    total_time=1.5,
    accepted_text_length=7,
    finish_reason="stop",
    num_input_tokens=3,
    num_output_tokens=4,
    num_drafts=1,
    num_draft_tokens=4,
    num_accepted_tokens=3,
)


def message(chunk: Chunk | None, *, final: bool = False) -> Any:
    """A response as the server sends it; None for one that only marks the end."""
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.parameters["triton_final_response"].bool_param = final
    if chunk is None:
        return response
    for name in (
        "accepted_text_length",
        "num_input_tokens",
        "num_output_tokens",
        "num_drafts",
        "num_draft_tokens",
        "num_accepted_tokens",
    ):
        add_output(response, name, "INT32", np.int32(getattr(chunk, name)))
    add_output(response, "sequence_index", "INT32", np.int32([[chunk.index]]))
    add_output(response, "text_output", "BYTES", chunk.text)
    add_output(response, "finish_reason", "BYTES", chunk.finish_reason or "")
    if chunk.token_ids:
        add_output(response, "output_ids", "INT32", np.int32([chunk.token_ids]))
        add_output(response, "is_accepted_draft", "BOOL", np.array([chunk.is_accepted_draft]))
        add_output(response, "logprobs", "BYTES", json.dumps(chunk.logprobs))
    if chunk.finish_reason:
        add_output(response, "stop_reason", "BYTES", chunk.stop_reason or "")
        add_output(response, "seed", "UINT64", np.uint64(chunk.seed))
        add_output(response, "num_cached_tokens", "INT32", np.int32([chunk.num_cached_tokens]))
        add_output(response, "time_to_first_token", "FP32", np.float32(chunk.time_to_first_token))
        add_output(response, "total_time", "FP32", np.float32(chunk.total_time))
    return response


def add_output(response: Any, name: str, kind: str, value: Any) -> None:
    shape = [1, *np.shape(value)[1:]]
    response.infer_response.outputs.add(name=name, datatype=kind, shape=shape)
    if isinstance(value, str):
        content = serialize_byte_tensor(np.array([value.encode()], np.object_)).item()
    else:
        content = value.tobytes()
    response.infer_response.raw_output_contents.append(content)


@pytest.fixture
def free_url() -> Iterator[str]:
    """An address where nobody listens, nor will while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def exchange() -> Exchange[Chunk]:
    return ask_for_text("host:1", "tandem", "prompt", True, {})


def test_only_the_options_that_were_given_are_sent() -> None:
    request = make_request("m", "grüße", stream=True, options={"top_k": 3, "drafter": "none"})
    tensors = {tensor.name: tensor for tensor in request.inputs}
    (options,) = tensors["sampling_parameters"].contents.bytes_contents
    assert request.model_name == "m"
    assert json.loads(options) == {"top_k": 3, "drafter": "none"}
    assert list(tensors["text_input"].contents.bytes_contents) == ["grüße".encode()]
    assert list(tensors["stream"].contents.bool_contents) == [True]
    assert all(list(tensor.shape) == [1, 1] for tensor in request.inputs)


def test_a_prompt_may_be_tokens_or_a_conversation() -> None:
    request = make_request("m", [3, 4, 5], stream=False, options={})
    tensors = {tensor.name: tensor for tensor in request.inputs}
    assert list(tensors["input_ids"].shape) == [1, 3]
    assert list(tensors["input_ids"].contents.int_contents) == [3, 4, 5]
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"name": "clock"}]
    request = make_request("m", messages, stream=False, options={"tools": tools})
    texts = {t.name: list(t.contents.bytes_contents) for t in request.inputs if t.name != "stream"}
    assert {name: json.loads(text) for name, (text,) in texts.items()} == {
        "messages": messages,
        "tools": tools,
        "sampling_parameters": {},
    }


def test_a_request_can_be_followed() -> None:
    options: Options = {"request_id": "r1", "traceparent": "00-1-2-01", "top_k": 3}
    request = make_request("m", "hi", stream=True, options=options)
    (sampling,) = [t for t in request.inputs if t.name == "sampling_parameters"]
    assert json.loads(sampling.contents.bytes_contents[0]) == {"top_k": 3}
    assert request.id == "r1"
    assert make_metadata("hi", options) == [("traceparent", "00-1-2-01")]


def prefix(prompt: Prompt, **options: Any) -> str:
    return dict(make_metadata(prompt, options)).get("tandem-prefix", "")  # type: ignore[arg-type]


def test_a_conversation_stays_with_its_server() -> None:
    system = {"role": "system", "content": "Be brief."}
    first, other = ({"role": "user", "content": text} for text in ("Why?", "How?"))
    turn = [system, first]
    later = [*turn, {"role": "assistant", "content": "So."}, other]
    assert prefix(turn) == prefix(later) != ""
    assert prefix(turn) != prefix([system, other])
    # What has no turns can go anywhere, unless the caller says that it begins like others.
    assert prefix("Why?") == prefix([1, 2, 3]) == prefix([system]) == ""
    assert prefix("Why?", prompt_cache_key="k") == prefix(later, prompt_cache_key="k") != ""


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        ("INVALID_ARG: top_p: too large", "INVALID_ARG", "top_p: too large"),
        ("[request id: <id_unknown>] Exceeds maximum queue size", "UNAVAILABLE", "Exceeds"),
        ("Request for unknown model: 'x' is not found", "NOT_FOUND", "Request for unknown"),
        ("unexpected shape for input 'top_k'", "INVALID_ARG", "unexpected shape"),
    ],
)
def test_errors_have_a_code(message: str, code: str, text: str) -> None:
    error = refusal(message)
    assert error.code == code
    assert str(error).startswith(text)


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid UTF-8"):
        make_request("m", "\udcff", stream=True, options={})


@pytest.mark.parametrize("chunk", [CHUNK, Chunk("")])
def test_a_response_is_read_as_it_was_sent(chunk: Chunk) -> None:
    assert exchange().read(message(chunk)) == [chunk]


def test_a_chunk_is_split_by_characters() -> None:
    assert (CHUNK.accepted_text, CHUNK.verifier_text) == ("naïve 🙂", " text")


def test_the_end_may_come_by_itself_or_with_the_last_text() -> None:
    alone, together = exchange(), exchange()
    alone.read(message(CHUNK))
    assert alone.read(message(None, final=True)) == []
    together.read(message(CHUNK, final=True))
    alone.check_ended()
    together.check_ended()


def test_a_stream_without_its_end_is_an_error() -> None:
    cut = exchange()
    cut.read(message(CHUNK))
    with pytest.raises(ServerUnavailableError, match="host:1"):
        cut.check_ended()


def test_an_error_in_the_stream_is_the_requests() -> None:
    refused = exchange()
    assert refused.read(service_pb2.ModelStreamInferResponse(error_message="top_p is wrong")) == []
    with pytest.raises(RequestError, match="top_p"):
        refused.check_ended()


def test_a_completion_adds_the_chunks_up() -> None:
    chunks = [Chunk("a", num_output_tokens=1), replace(CHUNK, index=0), CHUNK]
    completion = Completion.of(chunks, elapsed=0.5)
    assert completion.text == "a" + CHUNK.text
    assert completion.finish_reason == "stop"
    assert completion.num_input_tokens == 3
    assert completion.tokens_per_second == 10
    assert completion.acceptance_rate == 0.75
    assert completion.mean_acceptance_length == 4
    assert "75% of 4 draft tokens" in summary(completion)


def test_a_completion_without_drafts_has_no_acceptance_rate() -> None:
    completion = Completion.of([Chunk("a", num_output_tokens=1)], elapsed=1.0)
    assert completion.acceptance_rate is None
    assert completion.mean_acceptance_length == 1
    assert "nothing drafted" in summary(completion)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_accepted_text_is_tinted_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    printer(terminal)(CHUNK)
    assert terminal.getvalue() == "\033[32mnaïve 🙂\033[0m text"


def test_text_is_plain_in_a_pipe_and_under_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    pipe, terminal = io.StringIO(), Terminal()
    printer(pipe)(CHUNK)
    monkeypatch.setenv("NO_COLOR", "1")
    printer(terminal)(CHUNK)
    assert pipe.getvalue() == terminal.getvalue() == CHUNK.text


def test_help_has_examples_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert "examples:" in output
    assert "exit status:" in output


def test_wrong_usage_exits_with_2() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "x", "--top-k", "1.5"])
    assert exit_.value.code == 2


@pytest.mark.parametrize("time", range(3))
def test_no_server_exits_with_3(
    time: int, free_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # More than once: the refusal may come before or after the request is written.
    assert main(["generate", "x", "--url", free_url]) == 3
    assert f"no server answers at {free_url}: start one" in capsys.readouterr().err


def test_input_that_is_not_utf8_exits_with_1(
    free_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert main(["generate", "-", "--url", free_url]) == 1
    assert "not valid UTF-8" in capsys.readouterr().err


def test_clients_of_several_models_share_a_connection(
    free_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for module in (grpc, grpc.aio):
        connect = module.insecure_channel
        monkeypatch.setattr(
            module, "insecure_channel", lambda url, to=connect: made.append(url) or to(url)
        )

    async def ask() -> None:
        async with AsyncClient(free_url) as client:
            other = client.for_model("other")
            assert (other.model, client.model) == ("other", "tandem")
            assert not await other.is_ready()
            assert not await client.is_ready()

    asyncio.run(ask())
    assert made == [free_url]
    with Client(free_url) as client:
        assert client.for_model("other").model == "other"
    assert made == [free_url] * 2


def test_all_public_names_exist() -> None:
    assert all(hasattr(tandem_client, name) for name in tandem_client.__all__)


@pytest.mark.parametrize(("hits", "rate"), [((100, 400), "75%"), ((100, 100), "0%"), (None, "-")])
def test_stats_show_the_prefix_hits_of_the_interval(
    hits: tuple[int, int] | None, rate: str
) -> None:
    """300 of the 400 tokens looked for in the meantime, whatever there was before."""
    queries = (1000, 1400) if hits else (1000, 1000)
    samples = [
        Sample(
            float(at),
            {
                ("prefix_cache_queries_total", ()): float(queries[at]),
                ("prefix_cache_hits_total", ()): float((hits or (100, 100))[at]),
            },
        )
        for at in range(2)
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(render(compare(*samples)))
    (line,) = [one for one in console.file.getvalue().splitlines() if "prefix hits" in one]
    assert line.split() == ["prefix", "hits", rate]


def test_the_cache_is_as_full_as_its_scarcest_group() -> None:
    series = {
        (name, (("group", group),)): value
        for group, blocks, used in (("full", 100.0, 30.0), ("window_512", 20.0, 15.0))
        for name, value in (("kv_cache_blocks", blocks), ("kv_cache_blocks_used", used))
    }
    assert compare(Sample(0.0, {}), Sample(1.0, series)).kv_cache_usage == 0.75
    assert compare(Sample(0.0, {}), Sample(1.0, {})).kv_cache_usage == 0.0


def test_stats_say_why_speculation_gains_little(capsys: pytest.CaptureFixture[str]) -> None:
    """A reason that is over, at -1, is left out; a benchmark's coins are not."""

    def reason(name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        advice = f"sequences [at once]: {name}"
        labels = (("drafter", "mtp"), ("reason", name), ("advice", advice))
        return "spec_decode_low_gain", labels

    series = {reason("large_batch"): 16.0, reason("slow_drafter"): -1.0}
    figures = compare(Sample(0.0, {}), Sample(1.0, series))
    assert figures.low_gain == ["mtp: large_batch: 16.00 sequences [at once]: large_batch"]
    assert not figures.is_synthetic
    Console(width=200).print(render(figures))
    output = capsys.readouterr().out
    assert "mtp: large_batch: 16.00 sequences [at once]: large_batch" in output
    assert "by coin" not in output
    series["synthetic_acceptance", ()] = 1.0
    Console(width=200).print(render(compare(Sample(0.0, {}), Sample(1.0, series))))
    assert "Drafts are accepted by coin" in capsys.readouterr().out


@pytest.mark.parametrize("token_id", [99999999999, -(2**31) - 1])
def test_token_ids_that_fit_no_tensor_are_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match="token ids must be 32-bit numbers"):
        make_request("tandem", [5, token_id], stream=False, options={})
