"""The client and its command against a real server."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tandem_client
from stream import metric, wait_until
from tandem_client import AsyncClient, Client, Options, RequestError, RequestTimeoutError
from tandem_client.cli import main
from tandem_runtime.server import EXIT_TIMEOUT_SECONDS, TritonServer

# In the foreground, and as a script's background job, which starts with SIGINT ignored.
SHELLS = [[], ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]]
GREEDY: Options = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
# More than any test waits for.
ENDLESS: Options = {"max_tokens": 15000, "ignore_eos": True}
PROMPT = "abcabcabcabc"


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Client:
    return Client(server.grpc_url)


def is_idle(server: TritonServer) -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_blocks_used")
    return all(metric(server, name) == 0 for name in names)


def test_all_ways_give_the_same_answer(server: TritonServer, client: Client) -> None:
    async def both() -> tuple[str, str]:
        async with AsyncClient(server.grpc_url) as other:
            chunks = [chunk.text async for chunk in other.stream(PROMPT, **GREEDY)]
            return (await other.generate(PROMPT, **GREEDY)).text, "".join(chunks)

    completion = client.generate(PROMPT, **GREEDY)
    chunks = list(client.stream(PROMPT, **GREEDY))
    assert len(chunks) > 1
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert sum(chunk.num_output_tokens for chunk in chunks) == completion.num_output_tokens == 40
    assert completion.finish_reason == chunks[-1].finish_reason == "length"
    assert completion.num_input_tokens == len(PROMPT)
    assert asyncio.run(both()) == (completion.text, completion.text)
    assert tandem_client.generate(PROMPT, url=server.grpc_url, **GREEDY).text == completion.text
    streamed = tandem_client.stream(PROMPT, url=server.grpc_url, **GREEDY)
    assert "".join(chunk.text for chunk in streamed) == completion.text


def test_one_client_serves_many_threads(client: Client) -> None:
    expected = client.generate(PROMPT, **GREEDY).text
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(client.generate, PROMPT, **GREEDY) for _ in range(16)]
        assert {future.result().text for future in futures} == {expected}


def test_the_drafter_is_the_requests_choice(client: Client) -> None:
    plain = client.generate(PROMPT, drafter="none", **GREEDY)
    assert plain.acceptance_rate is None
    assert plain.text == client.generate(PROMPT, **GREEDY).text


def test_a_refused_request_says_why(server: TritonServer, client: Client) -> None:
    async def refused() -> None:
        async with AsyncClient(server.grpc_url) as other:
            await other.generate("x", drafter="eagle")

    with pytest.raises(RequestError, match="top_p must be"):
        client.generate("x", top_p=3.0)
    with pytest.raises(RequestError, match="eagle"):
        asyncio.run(refused())
    with pytest.raises(RequestError, match="unknown model"):
        Client(server.grpc_url, "nothing").generate("x")


def test_a_late_answer_is_cancelled(server: TritonServer) -> None:
    async def late() -> None:
        async with AsyncClient(server.grpc_url, timeout=0.3) as other:
            await other.generate("x", **ENDLESS)

    with pytest.raises(RequestTimeoutError):
        Client(server.grpc_url, timeout=0.3).generate("x", **ENDLESS)
    with pytest.raises(RequestTimeoutError):
        asyncio.run(late())
    wait_until(lambda: is_idle(server))


def test_leaving_the_loop_cancels_the_request(server: TritonServer, client: Client) -> None:
    for _ in client.stream("x", **ENDLESS):
        break
    num_threads = threading.active_count()
    for _ in range(5):
        for _ in client.stream("x", **ENDLESS):
            break
    wait_until(lambda: is_idle(server))
    # Each cancelled request once left a thread behind.
    wait_until(lambda: threading.active_count() <= num_threads)


def test_leaving_an_async_loop_cancels_the_request(server: TritonServer) -> None:
    async def leave() -> None:
        async with AsyncClient(server.grpc_url) as other:
            async for _ in other.stream("x", **ENDLESS):
                break
            # The connection stays open.
            await asyncio.to_thread(wait_until, lambda: is_idle(server))

    asyncio.run(leave())


def test_the_command_prints_the_text_and_then_the_figures(
    server: TritonServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    options: Options = {"temperature": 0.0, "max_tokens": 40}
    arguments = ["generate", PROMPT, "--url", server.grpc_url]
    arguments += ["--temperature", "0", "--max-tokens", "40"]
    expected = client.generate(PROMPT, **options)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == expected.text
    assert f"{expected.num_output_tokens} tokens" in captured.err
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == expected.text
    assert printed["acceptance_rate"] == expected.acceptance_rate


def test_the_command_exits_with_1_when_refused(
    server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--url", server.grpc_url, "--top-p", "3"]) == 1
    assert "top_p must be" in capsys.readouterr().err


def start_command(server: TritonServer, *shell: str) -> subprocess.Popen[bytes]:
    """The command in the middle of an answer that takes seconds: 1,385 tokens."""
    arguments = ["generate", "x", "--url", server.grpc_url, "--max-tokens", "3000", "--seed", "38"]
    process = subprocess.Popen(
        [*shell, sys.executable, "-m", "tandem_client.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    return process


@pytest.mark.parametrize("shell", SHELLS)
def test_ctrl_c_cancels_the_request(server: TritonServer, shell: list[str]) -> None:
    process = start_command(server, *shell)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.decode().strip().startswith("cancelled")
    wait_until(lambda: is_idle(server))


def test_a_closed_pipe_ends_the_command_quietly(server: TritonServer) -> None:
    process = start_command(server)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=10) == 0
    wait_until(lambda: is_idle(server))


def command(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tandem_client.cli", *arguments]
    return subprocess.run(line, input=text, capture_output=True, text=True, timeout=60)


def test_chat_keeps_the_conversation(server: TritonServer) -> None:
    options = ["--url", server.grpc_url, "--model", "short_queue", "--temperature", "0"]
    options += ["--max-tokens", "12"]
    result = command("chat", *options, "--system", "be brief", text="hello\n\nand you?\n")
    assert result.returncode == 0, result.stderr
    with Client(server.grpc_url, "short_queue") as client:
        messages = [{"role": "system", "content": "be brief"}]
        for question in ("hello", "and you?"):
            messages.append({"role": "user", "content": question})
            answer = client.generate(messages, temperature=0.0, max_tokens=12).text
            messages.append({"role": "assistant", "content": answer})
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert result.stdout == "".join(answers)
    assert result.stderr.count("tokens/s") == 2


def test_chat_is_with_the_first_model_that_has_a_template(server: TritonServer) -> None:
    """The server has `tandem`, which has none, and `short_queue` and `vllm_format`, which do."""
    with Client(server.grpc_url) as client:
        assert client.models() == ["short_queue", "tandem", "vllm_format"]
    options = ["--url", server.grpc_url, "--temperature", "0", "--max-tokens", "12"]
    picked, named = (
        command("chat", *options, *more, text="hello\n")
        for more in ((), ("--model", "short_queue"))
    )
    assert (picked.returncode, picked.stdout) == (0, named.stdout)


def test_chat_needs_a_template(server: TritonServer) -> None:
    result = command("chat", "--url", server.grpc_url, "--model", "tandem", text="hello\n")
    assert result.returncode == 1
    assert result.stderr.startswith(
        "error: messages can't be used: this model has no chat template"
    )


def test_stats_show_what_the_server_does(server: TritonServer, client: Client) -> None:
    options = ["--metrics-url", server.metrics_url, "--interval", "1"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, PROMPT, max_tokens=1500, ignore_eos=True)
        wait_until(lambda: metric(server, "num_requests_running") == 1)
        result = command("stats", "--json", *options)
        running.result()
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["num_running"] == 1
    # A token a step at least, but the two counters reach the server one after the other.
    assert figures["tokens_per_second"] > 0.9 * figures["steps_per_second"] > 0
    assert 0 < figures["kv_cache_usage"] < 1
    drafter = figures["drafters"]["ngram"]
    assert 0 <= drafter["acceptance_rate"] <= 1
    by_position = drafter["acceptance_by_position"]
    assert by_position == sorted(by_position, reverse=True)
    assert drafter["mean_acceptance_length"] == pytest.approx(1 + sum(by_position))


@pytest.mark.parametrize("shell", SHELLS)
def test_stats_run_until_they_are_stopped(server: TritonServer, shell: list[str]) -> None:
    line = [*shell, sys.executable, "-m", "tandem_client.cli", "stats", "--interval", "0.2"]
    with subprocess.Popen(
        [*line, "--metrics-url", server.metrics_url], stdout=subprocess.PIPE, text=True
    ) as process:
        threading.Timer(3, process.send_signal, [signal.SIGINT]).start()
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "tokens/s" in output
    assert "ngram" in output


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--metrics-url", "http://127.0.0.1:9/metrics"], 3, "no metrics at http://127.0.0.1:9"),
        (["--metrics-url", "nowhere"], 3, "no metrics at nowhere"),
        (["--model", "other"], 1, "shows no metrics of a model 'other'"),
        (["--interval", "0"], 2, "0 is not above 0"),
    ],
)
def test_stats_say_what_is_wrong(
    server: TritonServer, options: list[str], status: int, message: str
) -> None:
    if "--metrics-url" not in options:
        options = [*options, "--metrics-url", server.metrics_url]
    result = command("stats", *options)
    assert result.returncode == status
    assert message in result.stderr


@pytest.mark.slow
def test_refused_requests_do_not_hold_up_the_shutdown(private_repository: Path) -> None:
    with TritonServer(private_repository) as server:
        with Client(server.grpc_url) as client:
            for _ in range(100):
                with pytest.raises(RequestError, match="temperature"):
                    client.generate("x", temperature=-1)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < EXIT_TIMEOUT_SECONDS
