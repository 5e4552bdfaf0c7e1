"""Encrypted connections, and what is said where there is none."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import trustme

from gateway_setup import ask, error_of, fake_triton, gateway
from tandem_client import TLS, AsyncClient, Client, ServerUnavailableError
from tandem_client.cli import main


class Files:
    """Certificates in files, by what they are for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.foreign = trustme.CA(), trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        self.foreign.cert_pem.write_to_path(folder / "foreign_ca.pem")
        self.server = self._issue(self.authority, "127.0.0.1", "server")
        self.elsewhere = self._issue(self.authority, "elsewhere.example", "elsewhere")
        self._issue(self.authority, "client@tandem.example", "client")
        self._issue(self.foreign, "client@tandem.example", "foreign")

    def _issue(self, authority: trustme.CA, name: str, file: str) -> tuple[bytes, bytes]:
        issued = authority.issue_cert(name)
        key, chain = issued.private_key_pem, issued.cert_chain_pems[0]
        key.write_to_path(self.folder / f"{file}.key")
        chain.write_to_path(self.folder / f"{file}.pem")
        return key.bytes(), chain.bytes()

    def tls(self, ca: str = "ca", client: str | None = None) -> TLS:
        own = (self.folder / f"{client}.pem", self.folder / f"{client}.key") if client else ()
        return TLS(self.folder / f"{ca}.pem", *own)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def urls(files: Files) -> Iterator[dict[str, str]]:
    """Servers that listen without TLS, with it, with another's name, and with it on both sides."""
    ca = files.authority.cert_pem.bytes()
    credentials = {
        "plain": None,
        "tls": grpc.ssl_server_credentials([files.server]),
        "elsewhere": grpc.ssl_server_credentials([files.elsewhere]),
        "mutual": grpc.ssl_server_credentials([files.server], ca, True),
    }
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(fake_triton(each)).url for name, each in credentials.items()
        }


async def answer_of(client: AsyncClient) -> str:
    async with client:
        return (await client.generate("a b")).text


@pytest.mark.parametrize("server", ["tls", "mutual"])
def test_both_clients_speak_tls(files: Files, urls: dict[str, str], server: str) -> None:
    tls = files.tls(client="client" if server == "mutual" else None)
    assert Client(urls[server], tls=tls).generate("a b").text == "ab"
    assert asyncio.run(answer_of(AsyncClient(urls[server], tls=tls))) == "ab"


@pytest.mark.parametrize(
    ("server", "ca", "client", "message"),
    [
        ("tls", None, None, "speaks TLS, and was asked without: add --tls"),
        ("plain", "ca", None, r"doesn't speak TLS \(.*\): leave --tls out"),
        ("tls", "foreign_ca", None, "is not trusted: unable to get local issuer .*--ca-certif"),
        ("elsewhere", "ca", None, "is not trusted: IP address mismatch.*as the certificate does"),
        ("mutual", "ca", None, r"broke .* off: it may want a client certificate \(--client-cert"),
        ("mutual", "ca", "foreign", "it may want another client certificate"),
    ],
)
def test_an_error_says_what_is_wrong(
    files: Files, urls: dict[str, str], server: str, ca: str | None, client: str, message: str
) -> None:
    tls = files.tls(ca, client) if ca else None
    expected = f"{re.escape(urls[server])}.*{message}"
    with pytest.raises(ServerUnavailableError, match=expected):
        Client(urls[server], tls=tls).generate("a")
    with pytest.raises(ServerUnavailableError, match=expected):
        asyncio.run(answer_of(AsyncClient(urls[server], tls=tls)))
    with pytest.raises(ServerUnavailableError, match=expected):
        Client(urls[server], tls=tls).models()


def test_nobody_at_all_is_still_nobody(files: Files) -> None:
    with pytest.raises(ServerUnavailableError, match=r"no server answers at 127\.0\.0\.1:9"):
        Client("127.0.0.1:9", tls=files.tls()).generate("a")


def test_wrong_files_are_named(files: Files, tmp_path: Path) -> None:
    ca, key = files.folder / "ca.pem", files.folder / "client.key"
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for wrong in (junk, tmp_path / "absent.pem"):
        with pytest.raises(ValueError, match=f"the CA certificate '{wrong}' can't be used"):
            TLS(wrong)
        with pytest.raises(ValueError, match=f"the client certificate '{wrong}' and the key"):
            TLS(ca, wrong, key)
    with pytest.raises(ValueError, match="go together"):
        TLS(ca, client_key=key)


def test_the_commands_take_the_same_files(
    files: Files, urls: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files.folder
    options = ["--ca-certificate", f"{folder}/ca.pem", "--client-key", f"{folder}/client.key"]
    command = ["generate", "a b", "--url", urls["mutual"], *options]
    assert main([*command, "--client-certificate", f"{folder}/client.pem"]) == 0
    assert capsys.readouterr().out == "ab"
    assert main(command) == 1
    assert "a client certificate and its key go together" in capsys.readouterr().err
    assert main(["generate", "a b", "--url", urls["tls"], "--tls"]) == 3
    assert "is not trusted" in capsys.readouterr().err


def test_a_gateway_speaks_tls_with_its_server(files: Files, urls: dict[str, str]) -> None:
    with gateway(urls["mutual"], tls=files.tls(client="client")) as url:
        assert ask(url).json()["choices"][0]["text"] == "abc"
    with gateway(urls["mutual"], tls=files.tls()) as url:
        answer = ask(url)
        assert answer.status_code == 503
        assert "it may want a client certificate" in error_of(answer)["message"]
