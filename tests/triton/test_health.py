"""Who may ask whether the model lives, who may drain it, and where it listens."""

from __future__ import annotations

import http.client
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import psutil
import pytest

from tandem_fleet.local import container
from tandem_triton.health import DRAIN_HEADER, HealthServer


class Model:
    """What the server asks and drains."""

    def __init__(self) -> None:
        self.wrong = ""
        self.num_drains = 0

    def drain(self) -> None:
        self.num_drains += 1


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def serve(model: Model) -> Iterator[Callable[..., HealthServer]]:
    with ExitStack() as servers:

        def start(host: str = "") -> HealthServer:
            server = HealthServer(host, 0, lambda: "", lambda: model.wrong, model.drain)
            return servers.enter_context(closing(server))

        yield start


def ask(
    port: int,
    path: str,
    method: str = "GET",
    host: str = "127.0.0.1",
    source: str | None = None,
    **headers: str,
) -> int:
    """The answer's status."""
    origin = None if source is None else (source, 0)
    connection = http.client.HTTPConnection(host, port, timeout=5, source_address=origin)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, headers=names)
        return connection.getresponse().status
    finally:
        connection.close()


def test_readiness_is_the_models(serve: Callable[..., HealthServer], model: Model) -> None:
    port = serve().port
    assert ask(port, "/live") == ask(port, "/ready") == 200
    model.wrong = "it drains"
    assert (ask(port, "/live"), ask(port, "/ready")) == (200, 503)
    assert ask(port, "/else") == 404


def test_draining_takes_post_and_the_header(
    serve: Callable[..., HealthServer], model: Model
) -> None:
    """A page can make a browser on this machine send everything else."""
    port = serve().port
    assert ask(port, "/drain") == 405
    assert ask(port, "/drain", **{DRAIN_HEADER: "1"}) == 405
    assert ask(port, "/drain", "POST") == 403
    assert ask(port, "/drain", "POST", Origin="http://127.0.0.1", X_Drain="1") == 403
    assert ask(port, "/ready", "POST", **{DRAIN_HEADER: "1"}) == 405
    assert model.num_drains == 0
    assert ask(port, "/drain", "POST", **{DRAIN_HEADER: "1"}) == 200
    assert model.num_drains == 1


def test_no_page_can_set_the_header() -> None:
    """Names that begin so are forbidden to scripts, on the page's own origin too."""
    assert DRAIN_HEADER.lower().startswith("sec-")


def test_the_deployed_hook_drains(serve: Callable[..., HealthServer], model: Model) -> None:
    port = str(serve().port)
    hook = container()["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run([part.replace("8004", port) for part in hook], check=True)
    assert model.num_drains == 1


def test_only_this_machine_drains(serve: Callable[..., HealthServer], model: Model) -> None:
    header = {DRAIN_HEADER: "1"}
    port = serve().port
    assert ask(port, "/drain", "POST", source="127.0.0.2", **header) == 403
    assert model.num_drains == 0
    # An address of this machine's own, for a server that listens there alone.
    port = serve("127.0.0.3").port
    assert ask(port, "/drain", "POST", "127.0.0.3", "127.0.0.3", **header) == 200


def listeners(port: int) -> list[str]:
    """Where this process listens on the port: elsewhere somebody else may."""
    connections = psutil.Process().net_connections("tcp")
    return [c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port]


@pytest.mark.parametrize("host", ["127.0.0.3", "0.0.0.0"])
def test_it_listens_where_it_was_asked_to(serve: Callable[..., HealthServer], host: str) -> None:
    port = serve(host).port
    assert listeners(port) == [host]
    assert ask(port, "/live", host="127.0.0.3") == 200


needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


@needs_ipv6
@pytest.mark.parametrize("host", ["", "::"])
def test_everywhere_is_both_versions_of_ip(serve: Callable[..., HealthServer], host: str) -> None:
    port = serve(host).port
    for address in ("127.0.0.1", "::1"):
        assert ask(port, "/live", host=address) == 200
        assert ask(port, "/drain", "POST", address, **{DRAIN_HEADER: "1"}) == 200


@needs_ipv6
def test_it_listens_on_one_address_of_ipv6(serve: Callable[..., HealthServer]) -> None:
    port = serve("::1").port
    assert listeners(port) == ["::1"]
    assert ask(port, "/drain", "POST", "::1", **{DRAIN_HEADER: "1"}) == 200


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 0), ("no.such.host.invalid", 0), ("", 70000)]
)
def test_an_address_that_cannot_be_had(host: str, port: int) -> None:
    with pytest.raises(OSError, match=r"\w"):
        HealthServer(host, port, str, str, int)
