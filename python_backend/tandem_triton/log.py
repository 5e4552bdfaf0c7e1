"""The package's log in the server's."""

from __future__ import annotations

import logging

import triton_python_backend_utils as pb_utils
from transformers.utils import logging as transformers_logging


class _ServerLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(self.format(record))
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(self.format(record))
        else:
            pb_utils.Logger.log_info(self.format(record))


def log_to_server() -> None:
    """Sends what the package logs to the server's log, once however often it is called."""
    logger = logging.getLogger("tandem")
    if not logger.handlers:
        logger.addHandler(_ServerLog())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    transformers_logging.disable_progress_bar()
