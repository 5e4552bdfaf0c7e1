"""The `tandem` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TextIO, cast

from tandem_client.client import DEFAULT_MODEL, DEFAULT_URL, Client
from tandem_client.errors import RequestError, ServerUnavailableError, TandemClientError
from tandem_client.protocol import Chunk, Completion, Options

OK, FAILED, UNREACHABLE, INTERRUPTED = 0, 1, 3, 130

_EXAMPLES = """examples:
  tandem generate "The capital of France is" --max-tokens 32 --temperature 0
  tandem generate - --drafter none < prompt.txt
  tandem generate "Once upon a time" --seed 7 --json

exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no server, 130 interrupted
"""
_TINT, _PLAIN = "\033[32m", "\033[0m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return _generate(parsed)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem", description="Client of a Triton server that has the Tandem backend."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "generate",
        help="generate text and show it as it comes",
        description="Streams the answer to a prompt. Text that the drafter guessed right is green.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("prompt", help="the text to continue; - reads standard input")
    options = command.add_argument_group("how to generate (default: as the server does)")
    options.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: 128")
    options.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token")
    options.add_argument("--top-k", type=int, metavar="K")
    options.add_argument("--top-p", type=float, metavar="P")
    options.add_argument("--min-p", type=float, metavar="P")
    options.add_argument("--seed", type=int, metavar="N", help="the same seed, the same text")
    options.add_argument("--drafter", metavar="NAME", help='"none" for plain decoding')
    options.add_argument("--num-speculative-tokens", type=int, metavar="K", help="drafts a step")
    command.add_argument("--url", default=DEFAULT_URL, help=f"gRPC address ({DEFAULT_URL})")
    command.add_argument("--model", default=DEFAULT_MODEL, help=f"model name ({DEFAULT_MODEL})")
    command.add_argument("--timeout", type=float, metavar="S", help="seconds for the answer")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _generate(parsed: argparse.Namespace) -> int:
    prompt = read_input() if parsed.prompt == "-" else parsed.prompt
    client = Client(parsed.url, parsed.model, parsed.timeout)
    given = {name: getattr(parsed, name, None) for name in Options.__optional_keys__}
    options = cast("Options", {name: value for name, value in given.items() if value is not None})
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


def read_input() -> str:
    """Standard input; raises RequestError if it isn't UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8: {error}") from error


def follow(
    client: Client, prompt: str, options: Options, show: Callable[[Chunk], None]
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
