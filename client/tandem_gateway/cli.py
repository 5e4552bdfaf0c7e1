"""The `tandem-gateway` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import uvicorn

from tandem_client.client import DEFAULT_MODEL, DEFAULT_URL
from tandem_gateway.app import MAX_BODY_BYTES, create_app
from tandem_gateway.log import log_to_stderr

_EXAMPLES = """examples:
  tandem-gateway                                     then open http://127.0.0.1:9000/
  tandem-gateway --url triton:8001 --host 0.0.0.0 --port 80
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
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"model name ({DEFAULT_MODEL})")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=9000, help="port to listen on (9000)")
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=MAX_BODY_BYTES,
        metavar="N",
        help=f"larger requests are refused ({MAX_BODY_BYTES})",
    )
    parser.add_argument(
        "--drain-seconds",
        type=int,
        default=5,
        metavar="N",
        help="how long answers that are being streamed may go on after Ctrl-C or SIGTERM (5)",
    )
    parsed = parser.parse_args(arguments)
    log_to_stderr()
    # From the environment, so that no key shows in a list of processes.
    keys = [key for key in os.environ.get("TANDEM_API_KEYS", "").split(",") if key]
    app = create_app(parsed.url, parsed.model, api_keys=keys, max_body_bytes=parsed.max_body_bytes)
    print(f"serving http://{parsed.host}:{parsed.port}/ until Ctrl-C", file=sys.stderr)
    uvicorn.run(
        app,
        host=parsed.host,
        port=parsed.port,
        log_config=None,
        timeout_graceful_shutdown=parsed.drain_seconds,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
