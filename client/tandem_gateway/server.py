"""The web server: uvicorn, with our limits of connections."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from tandem_gateway.connections import Connections, Protocol


def make_server(app: FastAPI, host: str, port: int, drain_seconds: int) -> uvicorn.Server:
    """A server for an application of `create_app`, whose limits it keeps.

    Args:
        app: what to serve.
        host: the address to listen on.
        port: the port to listen on.
        drain_seconds: how long answers may go on once it was told to end.
    """
    connections = Connections(app.state.limits, app.state.metrics)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=cast("Any", partial(Protocol, connections=connections)),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=app.state.limits.idle_seconds,
        timeout_graceful_shutdown=drain_seconds,
    )
    return uvicorn.Server(config)
