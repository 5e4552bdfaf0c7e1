"""The component tls: three Envoys in a row as in the cluster, with certificates made here."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml
from tritonclient.grpc import service_pb2, service_pb2_grpc

from overlays import DEPLOY, find, pod_spec
from running_envoy import StandIn, make_ports, running

FOLDER = "overlays/gpu-tls"
TLS = DEPLOY / "components/tls/envoy"
FILES = {"gateway": "gateway.yaml", "balancer": "envoy.yaml", "server": "server.yaml"}
NAMES = {"gateway": "tandem-gateway", "balancer": "tandem-envoy", "server": "tandem-server"}


class Authority:
    """Issues certificates, as cert-manager's issuer does."""

    def __init__(self) -> None:
        self._authority = trustme.CA(key_type=trustme.KeyType.ECDSA)

    def issue(self, name: str, mount: Path) -> None:
        """A new certificate where pods find it, swapped in one step as the kubelet does."""
        issued = self._authority.issue_cert(name, key_type=trustme.KeyType.ECDSA)
        [certificate] = issued.cert_chain_pems
        files = {
            "tls.crt": certificate,
            "tls.key": issued.private_key_pem,
            "ca.crt": self._authority.cert_pem,
        }
        version = mount / f"..{time.monotonic_ns()}"
        version.mkdir(parents=True)
        for file, pem in files.items():
            pem.write_to_path(version / file)
            if not (mount / file).is_symlink():
                (mount / file).symlink_to(f"..data/{file}")
        (mount / "..new").symlink_to(version.name)
        (mount / "..new").replace(mount / "..data")


class Chain:
    """Gateway's, balancer's and server's Envoy, and where each keeps its certificate."""

    def __init__(self, directory: Path, ports: dict[str, int]) -> None:
        self.directory = directory
        self.ports = ports
        self.authority = Authority()
        self.foreign = Authority()

    def mount(self, part: str) -> Path:
        return self.directory / part / "tls"

    def config(self, part: str) -> str:
        """Its configuration, and beside it the files that this names, with this machine's paths."""
        self.authority.issue(NAMES[part], self.mount(part))
        folder = self.directory / part
        for file in ("certificate.yaml", "ca.yaml"):
            text = (TLS / file).read_text().replace("/etc/tls", str(self.mount(part)))
            (folder / file).write_text(text)
        return (TLS / FILES[part]).read_text().replace("/etc/envoy/", f"{folder}/")

    def connect(self, port: str, part: str | None, name: str) -> ssl.SSLSocket:
        """A connection with the certificate of `part`, to whom is called `name`."""
        context = ssl.create_default_context(cafile=str(self.mount("server") / "ca.crt"))
        context.set_alpn_protocols(["http/1.1"])
        if part:
            mount = self.mount(part)
            context.load_cert_chain(mount / "tls.crt", mount / "tls.key")
        peer = socket.create_connection(("127.0.0.1", self.ports[port]), timeout=5)
        return context.wrap_socket(peer, server_hostname=name)

    def get(self, port: str, part: str | None, name: str) -> int:
        """The status that a question over HTTP gets; raises OSError if it isn't let in."""
        with self.connect(port, part, name) as peer:
            peer.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = peer.recv(1000)
            if not answer:
                raise ConnectionResetError
            return int(answer.split()[1])

    def serial(self) -> Any:
        with self.connect("server_grpc", "balancer", "tandem-server") as peer:
            certificate = peer.getpeercert()
            assert certificate
            return certificate["serialNumber"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with ExitStack() as stack:
        behind = stack.enter_context(StandIn())
        chain = Chain(tmp_path_factory.mktemp("tls"), make_ports(behind, tls=True))
        for part in ("server", "balancer", "gateway"):
            text = chain.config(part)
            folder = chain.directory / part
            stack.enter_context(running(text, part, chain.ports, folder))
        chain.foreign.issue("tandem-envoy", chain.mount("foreigner"))
        yield chain


def ask(port: int) -> str:
    """The id of what a stream answers."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(id="a")
        (answer,) = stub.ModelStreamInfer(iter([request]), timeout=10, wait_for_ready=True)
    return str(answer.infer_response.id)


def test_a_stream_passes_all_three(chain: Chain) -> None:
    deadline = time.monotonic() + 10
    while True:  # until the balancer's health checks know the server
        try:
            assert ask(chain.ports["gateway"]) == "a"
            break
        except grpc.RpcError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_http_passes_with_a_certificate(chain: Chain) -> None:
    assert chain.get("http", "gateway", "tandem-envoy") == 200


@pytest.mark.parametrize("port", ["grpc", "server_grpc"])
def test_nothing_is_heard_in_the_clear(chain: Chain, port: str) -> None:
    with pytest.raises(grpc.RpcError):
        ask_once(chain.ports[port])


def ask_once(port: int) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelReady(service_pb2.ModelReadyRequest(name="tandem"), timeout=3)


@pytest.mark.parametrize("port", ["http", "server_http"])
def test_nothing_is_heard_in_the_clear_over_http(chain: Chain, port: str) -> None:
    with socket.create_connection(("127.0.0.1", chain.ports[port]), timeout=5) as peer:
        peer.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        with suppress(ConnectionError):
            answer = peer.recv(1000)
    assert answer == b""


@pytest.mark.parametrize(
    ("port", "name", "part"),
    [
        ("http", "tandem-envoy", None),
        ("http", "tandem-envoy", "foreigner"),
        ("server_http", "tandem-server", None),
        ("server_http", "tandem-server", "foreigner"),
        # Ours, but not the one that balances.
        ("server_http", "tandem-server", "gateway"),
    ],
)
def test_others_are_not_let_in(chain: Chain, port: str, name: str, part: str | None) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        chain.get(port, part, name)


def test_a_renewed_certificate_is_used_without_a_restart(chain: Chain) -> None:
    before = chain.serial()
    for part, name in NAMES.items():
        chain.authority.issue(name, chain.mount(part))
    deadline = time.monotonic() + 10
    while chain.serial() == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert chain.get("server_http", "balancer", "tandem-server") == 200
    assert ask(chain.ports["gateway"]) == "a"


_ADDED = {"transport_socket", "transport_socket_matches", "transport_socket_match_criteria"}


def without_tls(config: Any) -> Any:
    if isinstance(config, list):
        return [without_tls(each) for each in config]
    if isinstance(config, dict):
        return {key: without_tls(value) for key, value in config.items() if key not in _ADDED}
    return config


def test_with_tls_envoy_does_what_it_does_without() -> None:
    config = yaml.safe_load((TLS / "envoy.yaml").read_text())
    del config["node"]
    base = yaml.safe_load((DEPLOY / "base/envoy/envoy.yaml").read_text())
    assert without_tls(config) == base
    encrypted = [c["name"] for c in config["static_resources"]["clusters"] if len(_ADDED & set(c))]
    assert encrypted == ["tandem", "tandem_by_prefix", "tandem_http"]
    heard = [x for x in config["static_resources"]["listeners"] if "status" not in x["name"]]
    for listener in heard:
        (chain,) = listener["filter_chains"]
        assert chain["transport_socket"]["typed_config"]["require_client_certificate"]


@pytest.mark.parametrize("part", ["gateway", "server"])
def test_the_envoy_beside_starts_first_and_ends_last(part: str) -> None:
    spec = pod_spec(FOLDER, "tandem" if part == "server" else NAMES[part])
    (beside,) = [c for c in spec["initContainers"] if c["name"] == "tls"]
    assert beside["restartPolicy"] == "Always"
    (volume,) = [v for v in spec["volumes"] if v["name"] == "tls"]
    assert volume["secret"]["secretName"] == f"tandem-{part}-tls"


def test_triton_listens_within_its_pod_alone() -> None:
    (triton,) = pod_spec(FOLDER)["containers"]
    for door in ("http", "grpc"):
        assert f"--{door}-address=127.0.0.1" in triton["args"]
    assert "--url=127.0.0.1:8001" in pod_spec(FOLDER, "tandem-gateway")["containers"][0]["args"]
    assert triton["startupProbe"]["httpGet"] == {"path": "/ready", "port": "health"}


def test_each_certificate_has_the_name_that_is_asked_for() -> None:
    for name in NAMES.values():
        spec = find(FOLDER, "Certificate", name)["spec"]
        assert name in spec["dnsNames"]
        assert spec["issuerRef"] == {"kind": "Issuer", "name": "tandem"}
        assert spec["privateKey"]["rotationPolicy"] == "Always"
