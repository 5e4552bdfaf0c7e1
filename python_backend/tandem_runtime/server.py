"""Starts and stops a Triton Inference Server that has the Tandem backend."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import psutil

from tandem_runtime.address import client_host, in_url, is_ipv6, pick_ports
from tandem_runtime.triton import TRITON, in_container, libpython_directory

# Models that load at the same time would spoil each other's measurements of what a step costs.
ONE_BY_ONE = "--model-load-thread-count=1"
LOG_DIRECTORY = TRITON / "log"
# How long the server lets running requests finish once it was asked to stop.
EXIT_TIMEOUT_SECONDS = 10
_POLL_SECONDS = 0.1
_LOG_LINES = 30
_STUB = "triton_python_backend_stub"
# A configuration that doesn't parse, a model that doesn't load, and the server's own last words.
_FAILURES = re.compile(
    r"""ERROR\ \S+\]\ (Error\ parsing\ text-format\ .*)
      | ^E\d{4}\ .*?"(Poll\ failed.*|failed\ to\ load.*?)(?:\\n\\nAt:.*)?"$
      | ^error:\ (.*)""",
    re.MULTILINE | re.VERBOSE,
)


class ServerError(RuntimeError):
    """The server could not be started, or did not become ready."""


class TritonServer:
    """A `tritonserver` process: as a context manager ready on entry and stopped on exit.

    Args:
        model_repository: a folder of models.
        models: which of them to serve; all when empty.

    Raises:
        ServerError: the repository has no such model.

    Attributes:
        host: the address that the server listens on.
        http_port: port of the HTTP service; where none was given, a free one that was picked.
        grpc_port: likewise of the gRPC service.
        metrics_port: likewise of `/metrics`.
        log_file: all that the server and its models write.
    """

    def __init__(
        self,
        model_repository: Path | str,
        *,
        models: Sequence[str] = (),
        host: str = "127.0.0.1",
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        log_file: Path | str | None = None,
        log_verbose: int = 0,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = pick_ports(
            host, (http_port, grpc_port, metrics_port)
        )
        self.log_file = Path(log_file or LOG_DIRECTORY / f"server-{self.http_port}.log").absolute()
        self._repository, self._models = Path(model_repository).absolute(), models
        self._links: TemporaryDirectory[str] | None = None
        _check_models(self._repository, models)
        libevent_host = f"ipv6:{host}" if is_ipv6(host) else host
        self._options = [
            f"--backend-directory={TRITON / 'backends'}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_SECONDS}",
            "--strict-readiness=true",
            # Completing the configuration would load the backend's Python twice.
            "--disable-auto-complete-config",
            f"--log-verbose={log_verbose}",
            f"--http-address={libevent_host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={in_url(host)}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={libevent_host}",
            f"--metrics-port={self.metrics_port}",
            *extra_args,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def http_url(self) -> str:
        """Where HTTP clients connect, with the scheme."""
        return f"http://{self._client_host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Where gRPC clients connect, as `host:port`."""
        return f"{self._client_host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """The page that Prometheus reads."""
        return f"http://{self._client_host}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            ServerError: it was not started.
        """
        return self._started().pid

    def memory(self) -> dict[str, float]:
        """Resident gigabytes of each model's process, by the model's name; of those that run."""
        found: dict[str, float] = {}
        children: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.pid).children(recursive=True)
        for process in children:
            with suppress(psutil.NoSuchProcess):
                program, *arguments = process.cmdline() or [""]
                # `REPOSITORY/MODEL/VERSION/model.py` comes first.
                if program.endswith(_STUB):
                    model = Path(arguments[0]).parents[1].name
                    found[model] = found.get(model, 0.0) + process.memory_info().rss / 1e9
        return found

    def start(self) -> None:
        """Starts the process, in a group of its own: a terminal's Ctrl-C doesn't reach it.

        Raises:
            ServerError: the server isn't installed.
        """
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        program = str(TRITON / "bin" / "tritonserver")
        try:
            with self.log_file.open("wb") as log:
                self._process = subprocess.Popen(
                    [program, f"--model-repository={self._link_models()}", *self._options],
                    env={**_environment(), "TANDEM_HOST": self.host},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise ServerError(f"{error.filename} is missing: run `make setup`") from error

    def wait_ready(
        self, timeout: float = 300, on_poll: Callable[[float], None] | None = None
    ) -> None:
        """Waits until the server and all its models are ready.

        Args:
            timeout: seconds to wait at most.
            on_poll: called several times a second with the seconds waited so far.

        Raises:
            ServerError: the server ended, or isn't ready in time; with the reason from its log.
        """
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            if self._started().poll() is not None:
                raise ServerError(self._explain("the server did not start"))
            if self.is_ready():
                return
            if waited > timeout:
                raise ServerError(self._explain(f"the server isn't ready after {timeout:.0f} s"))
            if on_poll is not None:
                on_poll(waited)
            time.sleep(_POLL_SECONDS)

    def is_ready(self) -> bool:
        """Whether the server answers that it and all its models are ready."""
        connection = http.client.HTTPConnection(f"{self._client_host}:{self.http_port}", timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def is_running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout: float = EXIT_TIMEOUT_SECONDS + 5) -> None:
        """Lets the server end its requests; kills it after `timeout` seconds or if interrupted."""
        try:
            if self._process is not None:
                self._end(self._process, timeout)
        finally:
            if self._links is not None:
                self._links.cleanup()

    @staticmethod
    def _end(process: subprocess.Popen[bytes], timeout: float) -> None:
        shared_memory = _shared_memory(process.pid)
        try:
            # The models' own processes hear it too: the backend ends its streams in time.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for path in shared_memory:
                path.unlink(missing_ok=True)

    def log_tail(self) -> str:
        """The last lines of the log."""
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def __enter__(self) -> TritonServer:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _link_models(self) -> Path:
        """Where the models lie that are to be served.

        Triton can be told which to load, but then clients may load and unload them.
        """
        if not self._models:
            return self._repository
        self._links = TemporaryDirectory(prefix="tandem-models-")
        for name in self._models:
            Path(self._links.name, name).symlink_to(self._repository / name)
        return Path(self._links.name)

    @property
    def _client_host(self) -> str:
        return client_host(self.host)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process

    def _explain(self, what: str) -> str:
        reason = failure_reason(self.log_file.read_text(encoding="utf-8", errors="replace"))
        detail = f"\n{reason}" if reason else f"; the end of its log:\n{self.log_tail()}"
        return f"{what}{detail}\n(full log: {self.log_file})"


def failure_reason(log: str) -> str:
    """What the server's log says about why it didn't start; empty if it says nothing."""
    reasons = [match[1] or match[2] or match[3] for match in _FAILURES.finditer(log)]
    # The server's own summary says least.
    return "\n".join(dict.fromkeys(reasons[:-1] or reasons))


def _check_models(repository: Path, models: Sequence[str]) -> None:
    there = model_names(repository)
    for name in models:
        if name not in there:
            raise ServerError(
                f"there is no model {name!r} in {repository}: it has {', '.join(there) or 'none'}"
            )


def model_names(repository: Path) -> list[str]:
    """The models of a repository."""
    return sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))


def _shared_memory(pid: int) -> set[Path]:
    """The regions shared by the server and its models; one that is killed leaves them behind."""
    try:
        maps = Path("/proc", str(pid), "maps").read_text(encoding="utf-8")
    except OSError:
        return set()
    return {Path(path) for path in re.findall(r"/dev/shm/triton_\S+", maps)}


def _environment() -> dict[str, str]:
    """The environment in which the stub finds the packages and the library of this Python."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not in_container():
        folders = [TRITON / "lib", libpython_directory(), os.environ.get("LD_LIBRARY_PATH")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(str(f) for f in folders if f)
    return environment
