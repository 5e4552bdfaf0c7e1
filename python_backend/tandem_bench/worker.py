"""One engine in a process of its own: it is asked in lines of JSON, and answers in lines of JSON.

Only the standard library is used, so that any virtual environment's Python can serve.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_STOP_SECONDS = 30


class WorkerError(RuntimeError):
    """A worker failed, or ended; with the end of its log."""


class Worker:
    """The asking end; as a context manager the process is ready on entry and ended on exit.

    Attributes:
        about: what the process says of the model that it loaded.
    """

    def __init__(
        self, name: str, command: list[str], environment: Mapping[str, str], log_file: Path
    ) -> None:
        """Starts the process.

        Args:
            environment: what is set in addition to this process's own.
            log_file: where all that the process prints goes.
        """
        self.name = name
        self.about: dict[str, Any] = {}
        self._log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
                text=True,
                # A terminal's Ctrl-C is for the asking end, which then closes this one.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Waits until the model is loaded; sets `about`.

        Raises:
            WorkerError: it could not be loaded.
        """
        self.about = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            WorkerError: the request failed, or the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("it has ended") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._error("it has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def _error(self, what: str) -> WorkerError:
        tail = self._log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return WorkerError("\n".join([f"{self.name}: {what}; its log ends:", *tail]))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


Handler = Callable[[dict[str, Any]], dict[str, Any]]


def serve(load: Callable[[], tuple[Handler, dict[str, Any]]]) -> None:
    """The answering end: loads, says what it loaded, and answers until its input ends.

    Args:
        load: returns what answers a request, and what to say of it.
    """
    # Libraries print; what they print must not get between the answers.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(work: Callable[[], dict[str, Any]]) -> None:
        try:
            result = work()
        except Exception as error:
            traceback.print_exc()
            result = {"error": repr(error)}
        channel.write(json.dumps(result) + "\n")
        channel.flush()

    handler: Handler | None = None

    def start() -> dict[str, Any]:
        nonlocal handler
        handler, description = load()
        return description

    answer(start)
    if handler is None:
        return
    for line in sys.stdin:
        request, handle = json.loads(line), handler
        answer(lambda request=request, handle=handle: handle(request))  # type: ignore[misc]
