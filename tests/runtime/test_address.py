"""Ports and URLs, of IPv4 and IPv6."""

from __future__ import annotations

import socket

import pytest

from tandem_runtime.address import client_host, pick_ports, port_is_free
from tandem_runtime.server import TritonServer

HOSTS = ["127.0.0.1", "0.0.0.0"]
if socket.has_dualstack_ipv6():
    HOSTS += ["::1", "::"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_port_is_free_or_taken(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not port_is_free(host, port)
    assert port_is_free(host, port)


@pytest.mark.parametrize("host", HOSTS)
def test_picked_ports_differ(host: str) -> None:
    ports = pick_ports(host, (None, 0, 8000, None))
    assert ports[2] == 8000
    assert len(set(ports)) == 4


def test_clients_of_everywhere_ask_this_machine() -> None:
    hosts = ("127.0.0.1", "0.0.0.0", "10.0.0.1", "::", "::1", "fd00::1")
    assert [client_host(host) for host in hosts] == [
        *("127.0.0.1", "127.0.0.1", "10.0.0.1"),
        *("[::1]", "[::1]", "[fd00::1]"),
    ]


@pytest.mark.skipif("::1" not in HOSTS, reason="no IPv6 here")
def test_urls_of_a_server_on_ipv6() -> None:
    server = TritonServer("repository", host="::1", http_port=80, grpc_port=81, metrics_port=82)
    assert server.http_url == "http://[::1]:80"
    assert server.grpc_url == "[::1]:81"
    assert server.metrics_url == "http://[::1]:82/metrics"
