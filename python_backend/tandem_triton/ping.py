"""Clients that ask whether the model lives, through the stream that they wait at."""

from __future__ import annotations

import logging
from typing import Any

import triton_python_backend_utils as pb_utils

logger = logging.getLogger("tandem")

# The request parameter that marks one; see tandem_client.heartbeat.
_PARAMETER = '"tandem_ping"'


def answer_ping(request: Any, reason: str) -> bool:
    """Answers a ping: with nothing, or with the reason why no requests are taken.

    It counts as no request, and waits for none.

    Returns:
        Whether it was one.
    """
    try:
        if _PARAMETER not in (request.parameters() or ""):
            return False
        sender = request.get_response_sender()
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if reason:
            error = pb_utils.TritonError(f"UNAVAILABLE: {reason}", pb_utils.TritonError.UNAVAILABLE)
            sender.send(pb_utils.InferenceResponse(error=error), final)
        else:
            sender.send(flags=final)
    except Exception:
        # Parameters that can't be read are those of a request, which says so.
        logger.debug("a ping could not be answered", exc_info=True)
        return False
    return True
