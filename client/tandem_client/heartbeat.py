"""Whether the model that owes an answer still lives.

Triton leaves the streams of a model open whose process has died, and refuses what comes after. So
a stream that hears nothing asks: it sends a ping, which the model answers at once. It goes through
the stream itself, and so to the same server, whatever balancer is in between.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from tritonclient.grpc import service_pb2

from tandem_client.errors import ServerUnavailableError

# A dead model's Triton takes a second for each refusal: five seconds hold all of it.
_QUIET_SECONDS = 1.5
# Another stream of this client was told; this one's refusal may come late, since many wait for one.
_TOLD_SECONDS = 1.0
_RECENT_SECONDS = 5.0
# A model that is stopped, not dead, may go on.
_PATIENCE_SECONDS = 30.0
TICK_SECONDS = 0.5
_PARAMETER = "tandem_ping"
_DEAD = "is not healthy"


class Deaths:
    """When one of a client's streams last learned that its model is dead."""

    def __init__(self) -> None:
        self.at = float("-inf")


class Heartbeat:
    """What one stream hears of its model, and when it asks.

    Args:
        url: the server's address, for error messages.
        model: the model's name there.
        deaths: shared by the streams of a client.
    """

    def __init__(self, url: str, model: str, deaths: Deaths) -> None:
        self._url = url
        self._model = model
        self._deaths = deaths
        self._id = f"ping-{secrets.token_hex(8)}"
        # None while nobody reads: what has come in the meantime says nothing yet.
        self._quiet_since: float | None = time.monotonic()
        self._pinged_at = self._quiet_since
        self._unanswered_since: float | None = None
        self.error: ServerUnavailableError | None = None

    def pause(self) -> None:
        """Nobody reads for now."""
        self._quiet_since = None

    def resume(self) -> None:
        """Somebody reads again."""
        self._quiet_since = time.monotonic()
        self._unanswered_since = None

    def read(self, message: Any) -> bool:
        """Whether the message answers a ping, and not the request.

        Raises:
            ServerUnavailableError: it says that the model's process is dead.
        """
        self.resume()
        text = message.error_message
        # Older servers refuse the parameter by name; that is an answer too.
        if message.infer_response.id != self._id and _PARAMETER not in text:
            return False
        if _DEAD in text:
            self._deaths.at = time.monotonic()
            raise self._died("the model's process is dead")
        return True

    def beat(self) -> Any | None:
        """A ping, if one is due; called every `TICK_SECONDS`. Sets `error` where hope is gone."""
        now, quiet_since = time.monotonic(), self._quiet_since
        if quiet_since is None:
            return None
        self._judge(now)
        if now - max(quiet_since, self._pinged_at) < _QUIET_SECONDS:
            return None
        self._pinged_at = now
        if self._unanswered_since is None:
            self._unanswered_since = now
        return make_ping(self._model, self._id)

    def _judge(self, now: float) -> None:
        if self._unanswered_since is None:
            return
        seconds = now - self._unanswered_since
        if seconds > _TOLD_SECONDS and now - self._deaths.at < _RECENT_SECONDS:
            self.error = self._died("the model's process is dead")
        elif seconds > _PATIENCE_SECONDS:
            self.error = self._died(f"the model has not answered for {_PATIENCE_SECONDS:.0f} s")

    def _died(self, what: str) -> ServerUnavailableError:
        return ServerUnavailableError(f"lost the answer from {self._url}: {what}")


def make_ping(model: str, ping_id: str) -> Any:
    """A request that asks only whether the model lives and takes requests."""
    request = service_pb2.ModelInferRequest(model_name=model, id=ping_id)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    request.parameters[_PARAMETER].bool_param = True
    tensor = request.inputs.add(name="stream", datatype="BOOL", shape=[1, 1])
    tensor.contents.bool_contents.append(True)
    return request


def says_ready(message: Any) -> bool:
    """Whether an answer to a ping is one of a model that takes requests."""
    text = message.error_message
    # One whose queue is full takes requests later; an older one refuses the parameter by name.
    return _DEAD not in text and ("UNAVAILABLE" not in text or "queue is full" in text)
