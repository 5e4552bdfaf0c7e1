"""Hears SIGTERM and SIGINT in a process whose main thread rarely runs Python.

Triton lets running requests go on until its exit timeout and then cuts them off, without a word
to the model. A signal to the model's own process comes in time: a terminal's Ctrl-C reaches it,
and `scripts/serve.py` passes SIGTERM on.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket


class ShutdownSignal:
    """Waits for a signal to shut down. Made on the main thread; `wait` is for any other."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        # The handlers run when the main thread gets to it; the byte is written at once.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def wait(self, seconds: float) -> bool:
        """Waits for a signal; whether one has come within the time."""
        ready, _, _ = select.select([self._reader], [], [], seconds)
        if ready:
            with contextlib.suppress(BlockingIOError):
                self._reader.recv(64)
        return bool(ready)
