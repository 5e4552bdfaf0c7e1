"""The gateway's log: a JSON object a line."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

logger = logging.getLogger("tandem.gateway")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def log_to_stderr() -> None:
    """Sends the gateway's log, and the web server's, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logger.setLevel(logging.INFO)
    # A line for each request that isn't HTTP is a way to fill disks; `/metrics` counts them.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def log_request(request_id: str, traceparent: str, outcome: str, seconds: float) -> None:
    """A request's end; the id is the answer's, and that in the server's log."""
    fields: dict[str, Any] = {"request_id": request_id, "outcome": outcome}
    if traceparent:
        fields["trace_id"] = traceparent.split("-")[1]
    logger.info("request", extra={"fields": {**fields, "seconds": round(seconds, 4)}})
