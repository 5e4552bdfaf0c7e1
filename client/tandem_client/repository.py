"""Which models a Triton server has, asked for over gRPC."""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2

from tandem_client.errors import RequestError, TandemClientError

_BACKEND = "tandem"

# Asks for the models that are loaded.
INDEX = service_pb2.RepositoryIndexRequest(ready=True)


def ready_models(index: Any) -> list[str]:
    """The names in the answer to `INDEX`, in order; a model may have several versions."""
    return sorted({model.name for model in index.models})


def config_request(name: str) -> Any:
    """Asks for a model's configuration."""
    return service_pb2.ModelConfigRequest(name=name)


def is_tandem(answer: Any) -> bool:
    """Whether a configuration is that of a model with our backend."""
    return bool(answer.config.backend == _BACKEND)


def untold(error: TandemClientError) -> TandemClientError:
    """The same, with the cure where the server, or a proxy before it, lets nobody ask."""
    if not isinstance(error, RequestError):
        return error
    return RequestError(
        f"the server doesn't say which models it has ({error}): name one, with --model", error.code
    )
