"""What drafting and verifying cost here, kept from one start to the next.

There is a file for each machine and configuration, in `$XDG_CACHE_HOME/tandem` or
`~/.cache/tandem`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from contextlib import suppress
from functools import partial

import torch
import transformers

from tandem.cache_files import find_file, keep_file
from tandem.calibration import Calibration
from tandem.config import EngineConfig
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.costs import CostModel, Costs
from tandem.lookahead.lookahead import Lookahead
from tandem.machine import code_hash
from tandem.wing import Wing

logger = logging.getLogger("tandem")

# Repetitions that usually differ by so much: something else has the machine.
_BUSY = 0.5
# Kernels, drivers and microcode change.
_MAX_AGE_SECONDS = 30 * 24 * 3600.0


def make_lookahead(config: EngineConfig, calibration: Calibration) -> Lookahead:
    """The lookahead that the configuration asks for, with what drafting costs here."""
    if config.lookahead == "fixed" or not config.drafter_configs:
        return Lookahead()
    name = _file_name(config, calibration.wing)
    costs = _kept(name) or _measured(name, calibration)
    model = CostModel(costs, when_wrong=partial(_drop, name))
    return AdaptiveLookahead(model, config.max_prefill_slowdown)


def _measured(name: str, calibration: Calibration) -> Costs:
    """Costs that are measured now, and kept if the machine was idle."""
    started = time.monotonic()
    costs = calibration.measure()
    logger.info(
        "measured costs of drafting and verifying in %.1f s: a pass over %s",
        time.monotonic() - started,
        ", ".join(f"{rows}: {1e3 * s:.1f} ms" for rows, s in costs.verify.points.items()),
    )
    if costs.spread > _BUSY:
        logger.warning(
            "the machine was busy while costs were measured (repetitions differ by %.0f %%): "
            "service corrects them, and the next start measures again",
            100 * costs.spread,
        )
        return costs
    text = json.dumps(costs.to_json(), indent=1)
    try:
        keep_file(name, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        logger.info("the costs can't be kept: %s", error)
    return costs


def _kept(name: str) -> Costs | None:
    """The costs that were kept under this name; None if there are none that are of use."""
    try:
        path = find_file(name)
        if path is None:
            return None
        text = path.read_bytes()
    except OSError as error:
        logger.warning("kept costs can't be read, measuring again: %s", error)
        return None
    try:
        costs = Costs.from_json(json.loads(text))
    except ValueError as error:
        logger.warning("%s holds no costs, measuring again: %s", path, error)
        path.unlink(missing_ok=True)
        return None
    age = time.time() - costs.measured_at
    if not -_MAX_AGE_SECONDS < age < _MAX_AGE_SECONDS:
        logger.info("%s is from another time, measuring again", path)
        path.unlink(missing_ok=True)
        return None
    logger.info("costs of drafting and verifying: from %s", path)
    return costs


def _drop(name: str, distortion: float) -> None:
    """Forgets costs that service disagrees with for long."""
    logger.warning(
        "the measured costs of passes are wrong here: some sizes by %.1f times as much as others; "
        "they are corrected, and the next start measures again",
        distortion,
    )
    with suppress(OSError):
        path = find_file(name)
        if path is not None:
            path.unlink(missing_ok=True)


def _file_name(config: EngineConfig, wing: Wing) -> str:
    facts = {
        "config": dataclasses.asdict(config),
        "device": wing.describe(),
        "versions": [torch.__version__, transformers.__version__],
        "code": code_hash(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"costs-{key[:16]}.json"
