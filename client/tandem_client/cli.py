"""The `tandem` command."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, TextIO, cast

from rich.live import Live

from tandem_client.client import DEFAULT_MODEL, DEFAULT_URL, Client
from tandem_client.errors import RequestError, ServerUnavailableError, TandemClientError
from tandem_client.options import Options, Prompt
from tandem_client.protocol import Chunk, Completion
from tandem_client.stats import DEFAULT_METRICS_URL, compare, read_sample, render
from tandem_client.tls import TLS, add_tls_options, tls_of

OK, FAILED, UNREACHABLE, INTERRUPTED = 0, 1, 3, 130

_EXIT_STATUS = """
exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no server, 130 interrupted
"""
_GENERATE_EXAMPLES = f"""examples:
  tandem generate "The capital of France is" --max-tokens 32 --temperature 0
  tandem generate - --drafter none < prompt.txt
  tandem generate "Once upon a time" --seed 7 --json
{_EXIT_STATUS}"""
_CHAT_EXAMPLES = f"""examples:
  tandem chat
  tandem chat --system "Answer in one sentence." --max-tokens 64
{_EXIT_STATUS}"""
_STATS_EXAMPLES = f"""examples:
  tandem stats
  tandem stats --json --interval 10 --metrics-url http://triton:8002/metrics
{_EXIT_STATUS}"""
_TINT, _PLAIN = "\033[32m", "\033[0m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    # A shell's background job starts with SIGINT ignored; `kill -INT` must stop it all the same.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["doctor"]:
        return _doctor(arguments[1:])
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        return status
    except KeyboardInterrupt:
        print("\ncancelled, on the server too", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except TandemClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, ServerUnavailableError) else FAILED


def _doctor(arguments: Sequence[str]) -> int:
    """Runs the engine's own command, where the engine is installed; the client needs none of it."""
    try:
        doctor = importlib.import_module("tandem_doctor.cli")
    except ImportError as error:
        print(f"error: `tandem doctor` needs the engine and its packages: {error}", file=sys.stderr)
        return FAILED
    status: int = doctor.main(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem", description="Client of a Triton server that has the Tandem backend."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, epilog: str) -> Any:
        command = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    def add_model(command: Any, default: str | None, shown: str) -> None:
        command.add_argument("--model", default=default, metavar="NAME", help=f"model ({shown})")

    command = add(
        "generate",
        _generate,
        "stream the answer to a prompt; text that the drafter guessed right is green",
        _GENERATE_EXAMPLES,
    )
    add_model(command, DEFAULT_MODEL, DEFAULT_MODEL)
    command.add_argument("prompt", help="the text to continue; - reads standard input")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    _add_options(command)

    command = add(
        "chat",
        _chat,
        "talk with a model that has a chat template; Ctrl-D ends it, Ctrl-C an answer",
        _CHAT_EXAMPLES,
    )
    add_model(command, None, "the first that has a chat template")
    command.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    _add_options(command)

    command = add(
        "stats",
        _stats,
        "show what the server is doing, until Ctrl-C",
        _STATS_EXAMPLES,
    )
    add_model(command, DEFAULT_MODEL, DEFAULT_MODEL)
    command.add_argument("--metrics-url", default=DEFAULT_METRICS_URL, help=DEFAULT_METRICS_URL)
    command.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="S", help="seconds between looks (2)"
    )
    command.add_argument("--json", action="store_true", help="print one look as JSON and end")

    # For --help alone: `main` hands it on, with its own options.
    commands.add_parser("doctor", help="check offline whether drafters pay and answers are exact")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 3600")
    return value


def _add_options(command: Any) -> None:
    options = command.add_argument_group("how to generate (default: as the server does)")
    options.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: 128")
    options.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token")
    options.add_argument("--top-k", type=int, metavar="K")
    options.add_argument("--top-p", type=float, metavar="P")
    options.add_argument("--min-p", type=float, metavar="P")
    options.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    options.add_argument("--seed", type=int, metavar="N", help="the same seed, the same text")
    options.add_argument("--drafter", metavar="NAME", help='"none" for plain decoding')
    options.add_argument("--num-speculative-tokens", type=int, metavar="K", help="drafts a step")
    command.add_argument("--url", default=DEFAULT_URL, help=f"gRPC address ({DEFAULT_URL})")
    command.add_argument("--timeout", type=float, metavar="S", help="seconds for the answer")
    add_tls_options(command)


def _generate(parsed: argparse.Namespace) -> int:
    prompt = read_input() if parsed.prompt == "-" else parsed.prompt
    client = Client(parsed.url, parsed.model, parsed.timeout, _tls(parsed))
    options = _options(parsed)
    show = ignore if parsed.json else printer(sys.stdout)
    completion = follow(client, prompt, options, show)
    if parsed.json:
        figures = {
            "tokens_per_second": completion.tokens_per_second,
            "acceptance_rate": completion.acceptance_rate,
        }
        print(json.dumps(dataclasses.asdict(completion) | figures))
    else:
        sys.stdout.flush()
        print(f"\n{summary(completion)}", file=sys.stderr)
    return OK


def _tls(parsed: argparse.Namespace) -> TLS | None:
    try:
        return tls_of(parsed)
    except ValueError as error:
        raise RequestError(str(error)) from error


def _options(parsed: argparse.Namespace) -> Options:
    given = {name: getattr(parsed, name, None) for name in Options.__optional_keys__}
    return cast("Options", {name: value for name, value in given.items() if value is not None})


def _chat(parsed: argparse.Namespace) -> int:
    messages: list[dict[str, str]] = []
    if parsed.system:
        messages.append({"role": "system", "content": parsed.system})
    with Client(parsed.url, timeout=parsed.timeout, tls=_tls(parsed)) as any_model:
        client = any_model.for_model(parsed.model or _chat_model(any_model))
        while (text := _ask()) is not None:
            messages.append({"role": "user", "content": text})
            try:
                completion = follow(client, messages, _options(parsed), printer(sys.stdout))
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": completion.text})
            sys.stdout.flush()
            print(f"\n{summary(completion)}", file=sys.stderr)
    return OK


def _chat_model(client: Client) -> str:
    """The first of the server's models that has a chat template."""
    for name in client.models():
        if client.for_model(name).describe().chat_template is not None:
            return name
    # Its refusal says what is missing.
    return DEFAULT_MODEL


def _ask() -> str | None:
    """The next line that isn't empty; None at the end of the input."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise RequestError(f"the input is not valid UTF-8: {error}") from error
        if text.strip():
            return text


def _stats(parsed: argparse.Namespace) -> int:
    before = read_sample(parsed.metrics_url, parsed.model)
    if parsed.json:
        time.sleep(parsed.interval)
        figures = compare(before, read_sample(parsed.metrics_url, parsed.model))
        print(json.dumps(dataclasses.asdict(figures)))
        return OK
    try:
        with Live(f"looking for {parsed.interval:g} s ...", auto_refresh=False) as live:
            while True:
                time.sleep(parsed.interval)
                after = read_sample(parsed.metrics_url, parsed.model)
                live.update(render(compare(before, after)), refresh=True)
                before = after
    except KeyboardInterrupt:
        return OK


def read_input() -> str:
    """Standard input; raises RequestError if it isn't UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8: {error}") from error


def follow(
    client: Client, prompt: Prompt, options: Options, show: Callable[[Chunk], None]
) -> Completion:
    """Streams an answer to `show`, and returns it whole."""
    start, chunks = time.monotonic(), []
    # Closed even if `show` is interrupted, so that the server hears of it.
    with closing(client.stream(prompt, **options)) as answer:
        for chunk in answer:
            show(chunk)
            chunks.append(chunk)
    return Completion.of(chunks, time.monotonic() - start)


def ignore(chunk: Chunk) -> None:
    """Shows nothing."""


def printer(output: TextIO) -> Callable[[Chunk], None]:
    """Writes chunks to `output`; on a terminal, accepted drafts are tinted."""
    tint = output.isatty() and "NO_COLOR" not in os.environ

    def show(chunk: Chunk) -> None:
        if tint and chunk.accepted_text:
            output.write(f"{_TINT}{chunk.accepted_text}{_PLAIN}{chunk.verifier_text}")
        else:
            output.write(chunk.text)
        output.flush()

    return show


def summary(completion: Completion) -> str:
    """One line: tokens, speed, acceptance."""
    line = f"{completion.num_output_tokens} tokens, {completion.tokens_per_second:.1f} tokens/s"
    if completion.acceptance_rate is None:
        return f"{line}, nothing drafted"
    return (
        f"{line}, {completion.acceptance_rate:.0%} of {completion.num_draft_tokens} draft tokens "
        "accepted"
    )


if __name__ == "__main__":
    sys.exit(main())
