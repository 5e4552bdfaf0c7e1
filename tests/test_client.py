"""The client without a server: what it sends, how it reads, and the command's exit status."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

import tandem_client
from tandem_client import Chunk, Completion, RequestError, ServerUnavailableError
from tandem_client.cli import main, printer, summary
from tandem_client.protocol import Exchange, make_request

CHUNK = Chunk(
    "naïve 🙂 text",
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
    counts = dataclasses.asdict(chunk)
    texts = {"text_output": counts.pop("text"), "finish_reason": counts.pop("finish_reason") or ""}
    for name, text in texts.items():
        content = serialize_byte_tensor(np.array([text.encode()], np.object_)).item()
        add_output(response, name, "BYTES", content)
    for name, count in counts.items():
        add_output(response, name, "INT32", np.int32(count).tobytes())
    return response


def add_output(response: Any, name: str, kind: str, content: bytes) -> None:
    response.infer_response.outputs.add(name=name, datatype=kind, shape=[1])
    response.infer_response.raw_output_contents.append(content)


@pytest.fixture
def free_url() -> Iterator[str]:
    """An address where nobody listens, nor will while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def exchange() -> Exchange:
    return Exchange("host:1", "tandem", "prompt", True, {})


def test_only_the_options_that_were_given_are_sent() -> None:
    request = make_request("m", "grüße", stream=True, options={"top_k": 3, "drafter": "none"})
    tensors = {tensor.name: tensor for tensor in request.inputs}
    (options,) = tensors["sampling_parameters"].contents.bytes_contents
    assert request.model_name == "m"
    assert json.loads(options) == {"top_k": 3, "drafter": "none"}
    assert list(tensors["text_input"].contents.bytes_contents) == ["grüße".encode()]
    assert list(tensors["stream"].contents.bool_contents) == [True]
    assert all(list(tensor.shape) == [1, 1] for tensor in request.inputs)


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid UTF-8"):
        make_request("m", "\udcff", stream=True, options={})


@pytest.mark.parametrize("chunk", [CHUNK, Chunk("")])
def test_a_response_is_read_as_it_was_sent(chunk: Chunk) -> None:
    assert exchange().read(message(chunk)) == chunk


def test_a_chunk_is_split_by_characters() -> None:
    assert (CHUNK.accepted_text, CHUNK.verifier_text) == ("naïve 🙂", " text")


def test_the_end_may_come_by_itself_or_with_the_last_text() -> None:
    alone, together = exchange(), exchange()
    alone.read(message(CHUNK))
    assert alone.read(message(None, final=True)) is None
    together.read(message(CHUNK, final=True))
    alone.check_ended()
    together.check_ended()


def test_a_stream_without_its_end_is_an_error() -> None:
    cut = exchange()
    cut.read(message(CHUNK))
    with pytest.raises(ServerUnavailableError, match="host:1"):
        cut.check_ended()


def test_an_error_in_the_stream_is_the_requests() -> None:
    with pytest.raises(RequestError, match="top_p"):
        exchange().read(service_pb2.ModelStreamInferResponse(error_message="top_p is wrong"))


def test_a_completion_adds_the_chunks_up() -> None:
    completion = Completion.of([Chunk("a", num_output_tokens=1), CHUNK], elapsed=0.5)
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


def test_all_public_names_exist() -> None:
    assert all(hasattr(tandem_client, name) for name in tandem_client.__all__)
