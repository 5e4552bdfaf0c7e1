"""Guides are checked first where a crash or a runaway harms nobody: in processes of their own.

The grammar library's parsers call themselves for each rule that leads to another, and a few lines
can keep them busy for minutes. What came through here ends soon, and on a stack of that size.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

from tandem.errors import InvalidRequestError
from tandem.requests import check_guides
from tandem.requests.params import Guide

# At once; others wait.
_NUM_PROCESSES = 2
# With all that a busy machine does besides.
_WALL_SECONDS = 20.0
_NICENESS = 15
_MAX_MESSAGE = 300


class GuideChecker:
    """Up to two processes, started when they are needed; safe to use from any thread."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(_NUM_PROCESSES):
            self._idle.put(None)
        weakref.finalize(self, _end, self._processes)

    def check(self, guide: Guide) -> str:
        """The guide as llguidance's matcher takes it.

        Raises:
            InvalidRequestError: it isn't one, with the library's reason, or it takes too much.
        """
        text = guide.text
        if guide.kind == "json_object":
            text = '{"type": "object"}'
        elif guide.kind == "choice":
            text = json.dumps(guide.choices)
        line = json.dumps({"kind": guide.kind, "text": text, "space": guide.space}).encode() + b"\n"
        process = self._idle.get()
        try:
            if process is None or process.poll() is not None:
                process = self._replace(process)
            answered = _ask(process, line)
            if not answered:
                # Gone for certain before the next guide gets it, and is refused in its place.
                raise InvalidRequestError(refusal(guide, _what_ended(process.wait())))
        finally:
            self._idle.put(process)
        answer: dict[str, str] = json.loads(answered)
        if "error" in answer:
            raise InvalidRequestError(refusal(guide, answer["error"]))
        return answer["source"]

    def _replace(self, ended: subprocess.Popen[bytes] | None) -> subprocess.Popen[bytes]:
        process = _start()
        self._processes.append(process)
        if ended is not None:
            self._processes.remove(ended)
            _end([ended])
        return process


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        with suppress(BrokenPipeError), process:
            pass  # which closes the pipes and waits


def refusal(guide: Guide, reason: str) -> str:
    """What the client is told, with the library's reason."""
    return f"{guide.kind} can't be used as a guide: {reason.strip()[:_MAX_MESSAGE]}"


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [_python(), check_guides.__file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A crash is told by the exit code; nothing of a guide goes into the log.
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is not for it
    )
    # From its first import on, it leaves the cores to the sequences that run.
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
    return process


def _python() -> str:
    """The interpreter; `sys.executable` may be another program that runs Python."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (Path(sys.executable), Path(sys.exec_prefix, "bin", name)):
        if path.name.startswith("python") and path.is_file():
            return str(path)
    return shutil.which(name) or "python3"


def _ask(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The line that is answered; empty if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(_WALL_SECONDS, process.kill)
    timer.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return b""
    finally:
        timer.cancel()


def _what_ended(code: int) -> str:
    if code in (-signal.SIGPROF, -signal.SIGKILL):
        seconds = check_guides.MAX_SECONDS
        return f"reading it takes longer than {seconds:g} s: make it simpler"
    return "it is too deep or too large to be read: make it simpler"
