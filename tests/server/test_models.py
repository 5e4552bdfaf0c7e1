"""A server's models: which are served, what they take, and how they are reached by TLS."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from repositories import write_repository
from tandem_client import TLS, Client, ServerUnavailableError
from tandem_runtime.server import ONE_BY_ONE, TritonServer


def test_each_model_says_what_it_takes_of_the_memory(server: TritonServer) -> None:
    memory = server.memory()
    assert sorted(memory) == ["short_queue", "tandem", "vllm_format"]
    assert all(0.1 < gigabytes < 5 for gigabytes in memory.values())


def test_some_of_the_models_are_served_with_tls(
    private_repository: Path, tiny_verifier: Path, tmp_path: Path
) -> None:
    """Through links, and with a certificate on both sides."""
    write_repository(private_repository, tiny_verifier, "left_out")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("127.0.0.1", "client@tandem.example"):
        issued = authority.issue_cert(name)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    options = [
        ONE_BY_ONE,
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={tmp_path}/127.0.0.1.pem",
        f"--grpc-server-key={tmp_path}/127.0.0.1.key",
        f"--grpc-root-cert={tmp_path}/ca.pem",
    ]
    own = (tmp_path / "client@tandem.example.pem", tmp_path / "client@tandem.example.key")
    with TritonServer(private_repository, models=["tandem"], extra_args=options) as server:
        with Client(server.grpc_url, tls=TLS(tmp_path / "ca.pem", *own)) as client:
            assert client.models() == ["tandem"]
            assert client.generate("abc", max_tokens=4, ignore_eos=True).num_output_tokens == 4
        for tls, message in (
            (None, "speaks TLS, and was asked without"),
            (TLS(), "is not trusted"),
            (TLS(tmp_path / "ca.pem"), "it may want a client certificate"),
        ):
            with pytest.raises(ServerUnavailableError, match=message):
                Client(server.grpc_url, tls=tls).generate("abc")
