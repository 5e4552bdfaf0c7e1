"""What `make serve` says without starting a server."""

from __future__ import annotations

import re
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_runtime import serve
from tandem_runtime.server import ServerError


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_taken_port_is_named_with_the_variable_to_change(taken_port: int) -> None:
    arguments = Namespace(host="127.0.0.1", http_port=0, grpc_port=taken_port, metrics_port=0)
    with pytest.raises(ServerError, match=rf"port {taken_port} is taken.*GRPC_PORT="):
        serve.check_ports(arguments)


def test_foreign_host_is_refused() -> None:
    arguments = Namespace(host="192.0.2.1", http_port=8000, grpc_port=0, metrics_port=0)
    with pytest.raises(ServerError, match=r"can't listen on 192\.0\.2\.1"):
        serve.check_ports(arguments)


def test_log_view_shows_each_complete_matching_line_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "server.log"
    view = serve.LogView(log)
    view.show(re.compile("W"))
    with log.open("w", encoding="utf-8") as file:
        file.write("W one\nI two\nW thr")
        file.flush()
        view.show(re.compile("W"))
        assert capsys.readouterr().out == "W one\n"
        file.write("ee\n")
        file.flush()
        view.show(re.compile("W"))
        assert capsys.readouterr().out == "W three\n"
