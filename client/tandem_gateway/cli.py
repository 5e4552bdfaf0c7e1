"""The `tandem-gateway` command."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from tandem_client.client import DEFAULT_URL
from tandem_client.tls import add_tls_options, tls_of
from tandem_gateway.app import create_app
from tandem_gateway.auth import read_keys
from tandem_gateway.limits import Limits
from tandem_gateway.log import log_to_stderr
from tandem_gateway.server import make_server
from tandem_gateway.tools.formats import REASONING_FORMATS, TOOL_FORMATS
from tandem_gateway.tools.plan import NONE, Parsers

_EXAMPLES = """examples:
  tandem-gateway                                     then open http://127.0.0.1:9000/
  tandem-gateway --url triton:8001 --host 0.0.0.0 --port 80
  tandem-gateway --url triton:8001 --ca-certificate ca.pem --model tandem_chat
  TANDEM_API_KEYS=key1,key2 tandem-gateway

  curl http://127.0.0.1:9000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "tandem", "prompt": "Once upon a time", "max_tokens": 32}'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tandem-gateway",
        description="The OpenAI API, and a chat page, in front of a Triton server with Tandem.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default=DEFAULT_URL, help=f"Triton's gRPC address ({DEFAULT_URL})")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="offer this model; may be repeated (all of the server's with Tandem)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=9000, help="port to listen on (9000)")
    parser.add_argument(
        "--drain-seconds",
        type=int,
        default=5,
        metavar="N",
        help="how long answers that are being streamed may go on after Ctrl-C or SIGTERM (5)",
    )
    add_tls_options(parser)
    parser.add_argument(
        "--allowed-origins",
        nargs="+",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="whose pages may send requests from a browser, https://HOST:PORT or '*' (nobody's)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse fields that nobody knows, which are ignored otherwise",
    )
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="answer to every model name, where there is one model",
    )
    parser.add_argument(
        "--tool-call-parser",
        choices=[*TOOL_FORMATS, NONE],
        default="",
        help="how models call tools (as their chat template says)",
    )
    parser.add_argument(
        "--reasoning-parser",
        choices=[*REASONING_FORMATS, NONE],
        default="",
        help="how models mark what they think (as their chat template says)",
    )
    _add_limits(parser)
    parsed = vars(namespace := parser.parse_args(arguments))
    try:
        tls = tls_of(namespace)
        limits = Limits(**{each.name: parsed[each.name] for each in fields(Limits)})
        keys = read_keys(os.environ)
    except ValueError as error:
        parser.error(str(error))
    log_to_stderr()
    app = create_app(
        parsed["url"],
        parsed["model"],
        tls=tls,
        api_keys=keys,
        allowed_origins=parsed["allowed_origins"],
        limits=limits,
        strict=parsed["strict"],
        any_model=parsed["any_model"],
        parsers=Parsers(parsed["tool_call_parser"], parsed["reasoning_parser"]),
    )
    host, port = parsed["host"], parsed["port"]
    print(f"serving http://{host}:{port}/ until Ctrl-C", file=sys.stderr)
    server = make_server(app, host, port, parsed["drain_seconds"])
    with suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started else 3


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no origin: give scheme and host, as https://example.com, or '*'"
        )
    return text


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits", "What is over one is answered 4xx or 503.")
    for each in fields(Limits):
        default: Any = each.default
        shown = (
            "none" if each.metadata["or_none"] else f"{default:g}" if default < 1000 else default
        )
        group.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="N",
            help=f"{each.metadata['help']} ({shown})",
        )


if __name__ == "__main__":
    sys.exit(main())
