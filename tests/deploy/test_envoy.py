"""What the deployed Envoy lets through to Triton: which calls, how large, for how long."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
import yaml
from tritonclient.grpc import service_pb2, service_pb2_grpc

from overlays import DEPLOY
from running_envoy import StandIn, make_ports, running

CONFIG = (DEPLOY / "base/envoy/envoy.yaml").read_text()
LIMIT = 2**20
GENERATE = "/v2/models/tandem/generate"
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
HARMLESS = {
    *("ServerLive", "ServerReady", "ServerMetadata"),
    *("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"),
    *("ModelInfer", "ModelStreamInfer"),
}


@dataclass(frozen=True)
class Front:
    """An Envoy, and what stands behind it."""

    ports: dict[str, int]
    behind: StandIn

    def request(self, method: str, path: str, body: bytes | None = None) -> int:
        """The status that a HTTP request gets."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["http"], timeout=10)
        connection.request(method, path, body)
        status = connection.getresponse().status
        connection.close()
        return status


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    # Half a second in place of half a minute.
    config = CONFIG.replace("request_timeout: 30s", "request_timeout: 0.5s")
    assert config != CONFIG
    with StandIn() as behind:
        ports = make_ports(behind, tls=False)
        with running(config, "balancer", ports, tmp_path_factory.mktemp("envoy")):
            front = Front(ports, behind)
            deadline = time.monotonic() + 10
            while front.request("GET", "/v2/health/ready") != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield front


@pytest.mark.parametrize("method", [m.name for m in SERVICE.methods])
def test_only_requests_and_questions_pass_over_grpc(front: Front, method: str) -> None:
    path = f"/inference.GRPCInferenceService/{method}"
    front.behind.asked.clear()
    with grpc.insecure_channel(f"127.0.0.1:{front.ports['grpc']}") as channel:
        # An empty message is one of every kind. What is none would do as well, but gRPC's server
        # never ends a call whose stream began with it, and with that never itself.
        try:
            _, call = channel.unary_unary(path).with_call(b"", timeout=10)
        except grpc.RpcError as error:
            call = error
    if method in HARMLESS:
        assert front.behind.asked == [path]
    else:
        assert call.code() == grpc.StatusCode.PERMISSION_DENIED
        assert front.behind.asked == []


def test_a_stream_of_several_requests_passes(front: Front) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{front.ports['grpc']}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        requests = (service_pb2.ModelInferRequest(id=str(n)) for n in range(3))
        answers = list(stub.ModelStreamInfer(requests, timeout=10))
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "path",
    [
        "/v2",
        "/v2/health/live",
        "/v2/models/tandem",
        "/v2/models/tandem/versions/1/ready",
        "/v2/models/tandem/config?x=y",
        "/v2/models/stats",
    ],
)
def test_questions_pass_over_http(front: Front, path: str) -> None:
    front.behind.asked.clear()
    assert front.request("GET", path) == 200
    assert front.behind.asked == [path]


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/tandem/unload",
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/region/a/register",
        "/v2/models/tandem/trace/setting",
        "/v2/trace/setting",
        "/v2/logging",
        "/metrics",
        "/drain",
        "/v2/models/tandem/../../repository/index",
        "/v2/models/tandem/%2e%2e/logging",
        "/v2/models/tandem%2Ftrace%2Fsetting",
        "/v2/models/tandem/generate/../../../logging",
        "//v2/logging",
    ],
)
def test_nothing_else_does(front: Front, path: str) -> None:
    front.behind.asked.clear()
    for method in ("GET", "POST"):
        assert front.request(method, path) in (400, 403)
    assert front.behind.asked == []


def test_a_body_of_the_limit_comes_whole(front: Front) -> None:
    front.behind.bodies.clear()
    assert front.request("POST", GENERATE, b" " * LIMIT) == 200
    assert front.behind.bodies == [(LIMIT, None)]


def test_a_larger_body_is_refused(front: Front) -> None:
    front.behind.asked.clear()
    assert front.request("POST", GENERATE, b" " * (LIMIT + 1)) == 413
    assert front.behind.asked == []


def chunked(front: Front, count: int, wait: float = 0.0) -> bytes:
    """The answer to a body of so many chunks of one byte."""
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", front.ports["http"]), timeout=10) as peer:
        peer.sendall(head.encode() + b"1\r\n \r\n" * count)
        time.sleep(wait)
        if not wait:
            peer.sendall(b"0\r\n\r\n")
        return peer.recv(1000)


def test_small_chunks_come_as_one_body(front: Front) -> None:
    """Each took a place on the stack of an old Triton, which a million overflowed."""
    front.behind.bodies.clear()
    assert chunked(front, 10_000).startswith(b"HTTP/1.1 200")
    assert front.behind.bodies == [(10_000, None)]


def test_a_body_that_does_not_come_is_waited_for_half_a_minute(front: Front) -> None:
    front.behind.asked.clear()
    assert chunked(front, 1, wait=1.0).startswith(b"HTTP/1.1 408")
    assert front.behind.asked == []
    assert "request_timeout: 30s" in CONFIG


def test_there_is_a_limit_wherever_http_goes() -> None:
    """Whichever listener leads to Triton's HTTP buffers the body first."""
    for listener in yaml.safe_load(CONFIG)["static_resources"]["listeners"]:
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        if "tandem_http" in str(manager["route_config"]):
            kinds = {f["name"].rpartition(".")[2]: f for f in manager["http_filters"]}
            assert list(kinds) == ["rbac", "buffer", "router"]
            assert kinds["buffer"]["typed_config"]["max_request_bytes"] == LIMIT
