"""Tandem as a Triton backend: requests become sequences, and what a step adds, responses.

`execute()` returns a coroutine at once. It has each request read on a thread of its own, hands what
it asks for to the engine, and steps the engine for all running sequences until its own are done.
What the engine has no room for waits there, not in Triton's queue: to leave it in that, `execute()`
would have to block, after which Triton's batcher may take half a second to see that it can go on.
See `Outbox` for how responses leave.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

# How often a thread of OpenMP looks for the next product before it sleeps. By default it is 300,000
# times, some milliseconds in which nothing else has its core. To be said before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from tandem import (
    Delta,
    Engine,
    EngineConfig,
    EngineStoppedError,
    QueueFullError,
    Sequence,
    StepError,
    TandemError,
)
from tandem.wing import wing_of
from tandem_triton.health import HealthServer
from tandem_triton.log import log_to_server
from tandem_triton.metrics import MetricsExporter
from tandem_triton.outbox import Outbox
from tandem_triton.ping import answer_ping
from tandem_triton.queries import Query, is_query
from tandem_triton.request import Request
from tandem_triton.shutdown import Drain
from tandem_triton.signals import ShutdownSignal

logger = logging.getLogger("tandem")

_WATCH_SECONDS = 0.05
# Whether a client is gone is a question to the server, for each request.
_ASK_SECONDS = 0.12
_MAX_ASKS_PER_SECOND = 100
# Every series that has changed is a message to the server.
_METRICS_SECONDS = 0.5
_DRAIN_SECONDS = 5.0
_MAX_QUEUE_SIZE = 128
# How long steps follow one another before the event loop looks around, which takes a while.
_TURN_SECONDS = 0.1
# A step, or the watching thread, that takes longer counts as hanging for good.
_HANG_SECONDS = 120.0
# Requests that are read at once: tokenizing a long text takes as long as many steps. A guide may
# take seconds, so those that have one don't hold up the others.
_READERS = _GUIDE_READERS = 2
# Where threads want more cores than there are, steps have ten times as much as those who read.
_READERS_NICENESS = 10
# So long a thread that reads keeps the interpreter from a step, which needs it between any two
# operations: Python's own 5 ms would make a step ten times as long.
_SWITCH_SECONDS = 0.0005
# Steps that fail one after the other before the engine counts as broken.
_MAX_FAILURES = 3
_SHUTTING_DOWN = EngineStoppedError("the server is shutting down")


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engine from the version directory's `model.json` and starts the threads."""
        log_to_server()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._stepper = ThreadPoolExecutor(1, "tandem-step")
        # OpenMP keeps a team for each thread that ever computed, and where there are more of their
        # threads than cores, they sleep after every product instead of waiting for the next.
        self._engine = self._stepper.submit(self._load_engine, args).result()
        self._metrics = MetricsExporter(self._engine, args)
        self._drain = Drain(self._parameter(args, "drain_seconds", _DRAIN_SECONDS))
        self._max_queue_size = int(self._parameter(args, "max_queue_size", _MAX_QUEUE_SIZE))
        self._stopped: EngineStoppedError | None = None
        self._turn = asyncio.Lock()
        self._lock = threading.Lock()
        self._requests: dict[Sequence, Request] = {}
        self._num_reading = 0
        self._readers = ThreadPoolExecutor(_READERS, "tandem-read", _be_nice)
        self._guide_readers = ThreadPoolExecutor(_GUIDE_READERS, "tandem-read-guide", _be_nice)
        self._outbox = Outbox()
        self._sends_between_steps = wing_of(self._engine.verifier.model.device).occupies_host
        self._shutdown_signal = ShutdownSignal()
        self._closing = False
        self._num_failures = 0
        self._step_began_at: float | None = None
        self._watched_at = time.monotonic()
        self._health = self._open_health(int(self._parameter(args, "health_port", 0)))
        self._threads = [threading.Thread(target=self._watch, name="tandem-watch", daemon=True)]
        if not self._sends_between_steps:
            sender = threading.Thread(target=self._outbox.run, name="tandem-send", daemon=True)
            self._threads.append(sender)
        for thread in self._threads:
            thread.start()
        # What there is now stays. Looking through it for garbage would hold up all streams for as
        # long as many steps, each time that a request of many parts is read.
        gc.collect()
        gc.freeze()

    def _open_health(self, port: int) -> HealthServer | None:
        if not port:
            return None
        # Triton doesn't tell its models where it was asked to listen.
        host = os.environ.get("TANDEM_HOST", "")
        try:
            return HealthServer(host, port, self._not_live, self._not_ready, self._drain.run)
        except OSError as error:
            where = f" on TANDEM_HOST, {host!r}," if host else ""
            raise pb_utils.TritonModelException(
                f"config.pbtxt: health_port {port}{where} can't be had: {error.strerror}"
            ) from None

    @staticmethod
    def _load_engine(args: dict[str, str]) -> Engine:
        path = Path(args["model_repository"]) / args["model_version"] / "model.json"
        try:
            config = EngineConfig.from_json(path)
            if args["model_instance_kind"] == "GPU" and config.device == "auto":
                device = f"cuda:{args['model_instance_device_id']}"
                config = dataclasses.replace(config, device=device)
            engine = Engine(config)
        except TandemError as error:
            # Without the traceback, which would bury what to change.
            raise pb_utils.TritonModelException(str(error)) from None
        if engine.tokenizer is None:
            raise pb_utils.TritonModelException(f"{config.verifier} has no tokenizer")
        return engine

    @staticmethod
    def _parameter(args: dict[str, str], name: str, default: float) -> float:
        given = json.loads(args["model_config"]).get("parameters", {}).get(name)
        if given is None:
            return default
        try:
            value = float(given["string_value"])
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise pb_utils.TritonModelException(
                f"config.pbtxt: parameter {name} must be a number from 0, "
                f"got {given['string_value']!r}"
            )
        return value

    # --- on Triton's thread

    def execute(self, requests: list[Any]) -> Coroutine[Any, Any, None] | None:
        """Refuses what the queue has no room for, and returns what runs the others to their end."""
        asked = [each for each in requests if not answer_ping(each, self._not_ready())]
        arrived = [(self._receive(request), request) for request in asked]
        admitted = [pair for pair in arrived if self._has_room(pair[0])]
        # The stub never forgets a coroutine that ends before it is noted down.
        return self._serve(admitted) if admitted else None

    def _receive(self, request: Any) -> Request | Query:
        return Query(request) if is_query(request) else Request(request, self._metrics)

    def _has_room(self, request: Request | Query) -> bool:
        with self._lock:
            num_waiting = len(self._requests) + self._num_reading - self._engine.config.max_num_seqs
            if num_waiting < self._max_queue_size:
                self._num_reading += 1
                return True
        error = QueueFullError(
            f"the queue is full, {num_waiting} wait: try again later, or raise max_queue_size "
            f"({self._max_queue_size}) in config.pbtxt"
        )
        _refuse(request, error)
        return False

    # --- asked about

    def is_ready(self) -> bool:
        """Asked by servers that know it: False once the engine has failed or is shutting down."""
        return not self._not_ready()

    def _not_live(self) -> str:
        """Why this process should be started anew; empty if it works."""
        now = time.monotonic()
        if self._stopped is not None and self._stopped is not _SHUTTING_DOWN:
            return str(self._stopped)
        began_at = self._step_began_at
        if now - min(self._watched_at, now if began_at is None else began_at) > _HANG_SECONDS:
            return f"nothing has moved for {_HANG_SECONDS:.0f} s"
        return ""

    def _not_ready(self) -> str:
        """Why new requests should go elsewhere; empty if they may come, even if they must wait."""
        if self._drain.has_started or self._stopped is _SHUTTING_DOWN:
            return str(_SHUTTING_DOWN)
        return self._not_live()

    def finalize(self) -> None:
        """Ends what still runs with an error, sends it, and stops the threads."""
        self._stepper.submit(self._stop, _SHUTTING_DOWN).result()
        self._readers.shutdown()
        self._guide_readers.shutdown()
        self._stepper.shutdown()
        self._closing = True
        self._outbox.close()
        for thread in self._threads:
            thread.join()
        if self._health is not None:
            self._health.close()

    # --- on the event loop, and the thread that steps

    async def _serve(self, arrived: list[tuple[Request | Query, Any]]) -> None:
        await asyncio.gather(*(self._serve_one(*pair) for pair in arrived))

    async def _serve_one(self, request: Request | Query, triton_request: Any) -> None:
        await self._run(await self._admit(request, triton_request))

    async def _admit(self, request: Request | Query, triton_request: Any) -> list[Sequence]:
        """The sequences that a request asks for, which the engine has then; a query has none."""
        run = asyncio.get_running_loop().run_in_executor
        try:
            if isinstance(request, Query):
                await run(self._readers, request.answer, triton_request, self._engine)
                return []
            await run(self._readers, request.read, triton_request)
            readers = self._guide_readers if request.has_guide else self._readers
            sequences = await run(readers, self._make_sequences, request, triton_request)
            with self._lock:
                if self._stopped is not None:
                    raise self._stopped
                self._requests.update(dict.fromkeys(sequences, request))
        except TandemError as error:
            _refuse(request, error)
            return []
        except Exception as error:
            if self._stopped is not None:  # and there are no readers any more
                _refuse(request, self._stopped)
                return []
            # No input may harm the other requests of the call.
            logger.exception("a request could not be read")
            kind = type(error).__name__
            _refuse(request, TandemError(f"internal error ({kind}); the server's log has more"))
            return []
        finally:
            with self._lock:
                self._num_reading -= 1
        for sequence in sequences:
            self._engine.add(sequence)
        return sequences

    def _make_sequences(self, request: Request, triton_request: Any) -> list[Sequence]:
        """Unless nobody waits for them any more; others may have been read for long before."""
        reason = self._stopped or request.reason_to_end(_ASK_SECONDS)
        if reason is not None:
            raise reason
        return request.make_sequences(triton_request, self._engine)

    async def _run(self, sequences: list[Sequence]) -> None:
        """Takes turns with the other calls in stepping the engine, until `sequences` are done."""
        loop = asyncio.get_running_loop()
        while not all(sequence.is_finished for sequence in sequences):
            async with self._turn:
                if not all(sequence.is_finished for sequence in sequences):
                    await loop.run_in_executor(self._stepper, self._take_turn)

    def _take_turn(self) -> None:
        """Steps until a sequence ends, or for a short while."""
        until = time.monotonic() + _TURN_SECONDS
        while self._step() and time.monotonic() < until:
            pass

    def _step(self) -> bool:
        """Whether the same sequences go on."""
        self._step_began_at = began_at = time.monotonic()
        goes_on = False
        try:
            deltas = self._engine.step()
        except Exception as error:
            self._num_failures += 1
            if self._num_failures < _MAX_FAILURES:
                logger.exception("a step failed; the requests that were running end")
                self._hand_out(self._engine.abort(_step_error(error), waiting=False))
            else:
                logger.exception("the engine failed; it takes no more requests")
                self._stop(EngineStoppedError(f"the engine failed in a step: {error!r}"))
        else:
            self._num_failures = 0
            self._hand_out(deltas, time.monotonic() - began_at)
            goes_on = not any(delta.finish_reason for delta in deltas)
        self._step_began_at = None
        return goes_on

    def _stop(self, error: EngineStoppedError) -> None:
        """Takes no more requests and ends the running ones; no step may be running."""
        with self._lock:
            self._stopped = error
        self._hand_out(self._engine.abort(error))

    def _hand_out(self, deltas: list[Delta], seconds: float = 0.0) -> None:
        with self._lock:
            for delta in deltas:
                request = self._requests[delta.sequence]
                if delta.finish_reason is not None:
                    del self._requests[delta.sequence]
                self._outbox.put(request, delta)
        if self._sends_between_steps:
            self._outbox.send_due(seconds)

    # --- on threads of their own

    def _watch(self) -> None:
        """Looks for clients that went away and for a shutdown, and keeps the metrics up to date."""
        shown_at = 0.0
        while not self._closing:
            self._watched_at = now = time.monotonic()
            if self._shutdown_signal.wait(_WATCH_SECONDS):
                self._drain.start()
                # Unlike a balancer, whoever sends a signal sends nothing after it.
                with self._lock:
                    self._stopped = self._stopped or _SHUTTING_DOWN
            self._drain.observe(busy=bool(self._requests) or self._num_reading > 0)
            if self._drain.is_over and self._requests:
                self._stepper.submit(self._stop, _SHUTTING_DOWN).result()
            self._end_cancelled()
            if now - shown_at > _METRICS_SECONDS:
                shown_at = now
                self._metrics.update(alive=not self._not_live())

    def _end_cancelled(self) -> None:
        with self._lock:
            live = list(self._requests.items())
        ask_seconds = max(_ASK_SECONDS, len(live) / _MAX_ASKS_PER_SECOND)
        for request in {request for _, request in live}:
            if (reason := request.reason_to_end(ask_seconds)) is not None:
                for sequence, owner in live:
                    if owner is request and sequence.cancellation is None:
                        self._engine.cancel(sequence, reason)


def _be_nice() -> None:
    """Lets this thread, which reads, give way to steps."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _READERS_NICENESS)


def _refuse(request: Request | Query, error: TandemError) -> None:
    """Ends a request that was not admitted; a response that can't be sent harms no other."""
    try:
        request.fail(error)
    except Exception:
        logger.exception("a response could not be sent")


def _step_error(error: Exception) -> StepError:
    return StepError(f"a step of the engine failed, and this request was part of it: {error!r}")
