"""All doors of a server on one address of IPv6, the health port's among them."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest
import requests

from tandem_client import Client
from tandem_runtime.address import pick_ports
from tandem_runtime.server import TritonServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here"),
]


def test_every_door_is_on_the_address(private_repository: Path) -> None:
    config = private_repository / "tandem/config.pbtxt"
    [port] = pick_ports("::1", [None])
    parameter = f'parameters {{ key: "health_port" value {{ string_value: "{port}" }} }}\n'
    config.write_text(config.read_text() + parameter)
    with TritonServer(private_repository, host="::1") as server:
        assert requests.get(f"http://[::1]:{port}/ready", timeout=5).status_code == 200
        assert requests.get(server.metrics_url, timeout=5).status_code == 200
        answer = requests.post(
            f"{server.http_url}/v2/models/tandem/generate",
            json={"text_input": "one", "max_tokens": 3},
            timeout=30,
        )
        assert answer.status_code == 200
        with Client(server.grpc_url) as client:
            assert client.generate("one", max_tokens=3, ignore_eos=True).num_output_tokens == 3
        triton = psutil.Process(server.pid)
        listeners = {
            connection.laddr.ip
            for process in (triton, *triton.children(recursive=True))
            for connection in process.net_connections("tcp")
            if connection.status == "LISTEN"
        }
        assert listeners == {"::1"}
