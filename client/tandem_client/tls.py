"""Encrypted connections to a server, and what is wrong where there is none."""

from __future__ import annotations

import argparse
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc  # type: ignore[import-untyped]

_SECONDS = 2.0


@dataclass(frozen=True)
class TLS:
    """How to speak TLS with a server. All files are PEM.

    Args:
        ca_certificate: of whoever issued the server's certificate; the well-known authorities are
            trusted when not given.
        client_certificate: shown to a server that asks for one.
        client_key: its private key.

    Raises:
        ValueError: a file can't be read, or isn't what it should be; or one of the two for the
            client is missing.
    """

    ca_certificate: Path | str | None = None
    client_certificate: Path | str | None = None
    client_key: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("a client certificate and its key go together: give both or neither")
        self.context()

    def credentials(self) -> Any:
        """The same for gRPC."""
        files = (self.ca_certificate, self.client_key, self.client_certificate)
        return grpc.ssl_channel_credentials(
            *(None if file is None else Path(file).read_bytes() for file in files)
        )

    def context(self) -> ssl.SSLContext:
        """The same for Python's sockets."""
        try:
            context = ssl.create_default_context(cafile=self.ca_certificate)
        except OSError as error:
            raise ValueError(
                f"the CA certificate {str(self.ca_certificate)!r} can't be used: {error}"
            ) from error
        if self.client_certificate is not None and self.client_key is not None:
            try:
                context.load_cert_chain(self.client_certificate, self.client_key)
            except OSError as error:
                raise ValueError(
                    f"the client certificate {str(self.client_certificate)!r} and the key "
                    f"{str(self.client_key)!r} can't be used: {error}"
                ) from error
        return context


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `tls_of` reads."""
    group = parser.add_argument_group("encryption", "Each file is PEM, and asks for TLS by itself.")
    group.add_argument("--tls", action="store_true", help="speak TLS with the server")
    for name, help in (
        ("--ca-certificate", "of who issued the server's certificate (the well-known ones)"),
        ("--client-certificate", "for a server that wants one"),
        ("--client-key", "its private key"),
    ):
        group.add_argument(name, metavar="FILE", help=help)


def tls_of(parsed: argparse.Namespace) -> TLS | None:
    """What a command line asks for.

    Raises:
        ValueError: see `TLS`.
    """
    files = (parsed.ca_certificate, parsed.client_certificate, parsed.client_key)
    return TLS(*files) if parsed.tls or any(files) else None


def diagnose(url: str, tls: TLS | None) -> str:
    """Why gRPC got no connection to a server, found by trying: gRPC itself says too little.

    Returns:
        A sentence with the cure; empty where nobody listens, or encryption isn't to blame.
    """
    try:
        parts = urlsplit(f"//{url}")
        host, port = parts.hostname or "", parts.port or 0
        peer = socket.create_connection((host, port), _SECONDS)
    except (OSError, ValueError):
        return ""
    with peer:
        return _speaks_tls(peer, url) if tls is None else _refuses(peer, host, url, tls)


def _speaks_tls(peer: socket.socket, url: str) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        context.wrap_socket(peer).close()
    except OSError:
        return ""
    return f"the server at {url} speaks TLS, and was asked without: add --tls"


def _refuses(peer: socket.socket, host: str, url: str, tls: TLS) -> str:
    context = tls.context()
    context.set_alpn_protocols(["h2"])
    try:
        encrypted = context.wrap_socket(peer, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of the server at {url} is not trusted: {error.verify_message}; "
            "name who issued it (--ca-certificate), and the server as the certificate does"
        )
    except TimeoutError:
        return ""
    except OSError as error:
        # An alert is TLS: the server speaks it, and wants something else.
        if "ALERT" in str(getattr(error, "reason", "")):
            return f"the server at {url} refuses the TLS handshake: {error}"
        return f"the server at {url} doesn't speak TLS ({error}): leave --tls out"
    with encrypted:
        # A server judges a client's certificate after the handshake. One that is content speaks.
        try:
            is_content = bool(encrypted.recv(1))
        except TimeoutError:
            return ""
        except OSError:
            is_content = False
    if is_content:
        return ""
    wanted = "another client certificate" if tls.client_certificate else "a client certificate"
    return (
        f"the server at {url} broke the connection off: it may want {wanted} "
        "(--client-certificate, --client-key)"
    )
