"""Serves a model repository with Triton in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tandem_runtime.address import port_is_free
from tandem_runtime.paths import ROOT
from tandem_runtime.server import ONE_BY_ONE, ServerError, TritonServer, model_names

_ANY = re.compile("")
_WARNING = re.compile(r"[WE]\d{4} ")
# While it loads, Triton warns of each kind of device that this machine hasn't got.
_MODEL_WARNING = re.compile(r"[WE]\d{4} .*\.py:\d+\]")
_POLL_SECONDS = 0.2


def main() -> int:
    """Serves until told to stop and returns the exit status."""
    arguments = parse_arguments()
    # SIGTERM acts as Ctrl-C does, and so does SIGINT where a shell's background job ignores it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        check_ports(arguments)
        server = TritonServer(
            arguments.model_repository,
            models=arguments.models,
            host=arguments.host,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            log_verbose=int(arguments.verbose),
            extra_args=[ONE_BY_ONE],
        )
        serve(server, arguments)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-repository", default=ROOT / "model_repository", type=Path)
    parser.add_argument(
        "--models", nargs="*", default=[], metavar="NAME", help="which of its models (all)"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", default=8000, type=int)
    parser.add_argument("--grpc-port", default=8001, type=int)
    parser.add_argument("--metrics-port", default=8002, type=int)
    parser.add_argument("--verbose", action="store_true", help="show all of the server's log")
    return parser.parse_args()


def check_ports(arguments: argparse.Namespace) -> None:
    """Raises ServerError when a port can't be had, naming the variable that sets another."""
    for name in ("http_port", "grpc_port", "metrics_port"):
        port = getattr(arguments, name)
        try:
            free = port_is_free(arguments.host, port)
        except OSError as error:
            raise ServerError(
                f"can't listen on {arguments.host}:{port} ({error.strerror}): "
                f"choose another with HOST=... or {name.upper()}=..."
            ) from error
        if not free:
            raise ServerError(
                f"port {port} is taken: choose another, as in "
                f"`make serve {name.upper()}={port + 10}`"
            )


def serve(server: TritonServer, arguments: argparse.Namespace) -> None:
    """Runs the server until Ctrl-C, and shows what it has to say.

    Raises:
        ServerError: it didn't start, or ended by itself.
        KeyboardInterrupt: at a second Ctrl-C, by which the server is killed.
    """
    log = LogView(server.log_file)
    loading, serving = (_ANY, _ANY) if arguments.verbose else (_MODEL_WARNING, _WARNING)
    try:
        server.start()
        server.wait_ready(on_poll=lambda waited: log.show(loading, f"Loading ... {waited:.0f} s"))
        log.show(loading)
        models = arguments.models or model_names(arguments.model_repository)
        print(ready_line(server, models), flush=True)
        while server.is_running():
            log.show(serving)
            time.sleep(_POLL_SECONDS)
        log.show(serving)
        raise ServerError(f"the server ended by itself; the end of its log:\n{server.log_tail()}")
    except KeyboardInterrupt:
        log.show(serving)
        print("\rStopping; Ctrl-C kills the server.", flush=True)
    finally:
        log.show(serving)
        server.stop()


def ready_line(server: TritonServer, models: Sequence[str]) -> str:
    """Where the server listens, a first request, and what the models take of the memory."""
    example = f"{server.http_url}/v2/models/{models[0] if models else 'NAME'}/generate"
    request = json.dumps({"text_input": "1, 2, 3,", "max_tokens": 16, "temperature": 0})
    memory = ", ".join(f"{name} {size:.1f} GB" for name, size in sorted(server.memory().items()))
    return (
        f"Ready: {server.http_url} (HTTP), {server.grpc_url} (gRPC), {server.metrics_url}; try: "
        f"curl {example} -d '{request}'\nMemory: {memory}"
    )


class LogView:
    """Shows the new lines of a growing log, and on a terminal a line of progress below them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._progress = ""

    def show(self, pattern: re.Pattern[str], progress: str = "") -> None:
        """Prints the new lines that match, and replaces the line of progress."""
        lines = self._new_lines(pattern)
        if lines or progress != self._progress:
            self._clear()
            sys.stdout.writelines(lines)
            if sys.stdout.isatty():
                print(progress, end="", flush=True)
                self._progress = progress

    def _new_lines(self, pattern: re.Pattern[str]) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as log:
            log.seek(self._position)
            # The last line may still be in the writing.
            complete, newline, _ = log.read().rpartition(b"\n")
        self._position += len(complete) + len(newline)
        text = complete.decode("utf-8", "replace")
        return [f"{line}\n" for line in text.splitlines() if pattern.match(line)]

    def _clear(self) -> None:
        if self._progress:
            print("\r\033[K", end="")
            self._progress = ""
