"""Whether a token's logits depend on nothing but the tokens before it, to the last bit.

Then a seed gives the same tokens whatever else is in the batch, with drafts and without, and in a
type as coarse as bfloat16, in which the last bits decide between tokens often.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from contextlib import suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from tandem.cache_files import find_file, keep_file
from tandem.config import AUTO
from tandem.errors import UnsupportedModelError
from tandem.machine import code_hash
from tandem.wing import Wing, wing_of

logger = logging.getLogger("tandem")

# What "auto" pays at most, as a share of the time of products.
_MAX_COST = 0.03
# Of measuring, and where that seems to be too much.
_ROUNDS, _MORE_ROUNDS = 3, 30


def make_invariant(model: PreTrainedModel, choice: bool | str) -> bool:
    """Does what `EngineConfig.batch_invariant` asks for; whether it is so now.

    Raises:
        UnsupportedModelError: it was insisted on, and can't be done.
    """
    if choice is False:
        return False
    wing = wing_of(model.device)
    try:
        wing.check_attention(model.dtype)
        _check_linear(model, wing.linear)
        wing.use_own_products(model)
    except UnsupportedModelError as error:
        if choice != AUTO:
            raise
        logger.info("batch_invariant is off: %s", str(error).removeprefix("batch_invariant: "))
        return False
    costs = _costs(wing, model)
    said = ", ".join(f"{cost:+.0%}" for cost in costs.values())
    rows = ", ".join(map(str, costs))
    if choice == AUTO and max(costs.values()) > _MAX_COST:
        wing.use_library_products(model)
        logger.info("batch_invariant is off: products of %s rows would take %s", rows, said)
        return False
    logger.info("batch_invariant is on: products of %s rows take %s", rows, said)
    return True


def _costs(wing: Wing, model: PreTrainedModel) -> dict[int, float]:
    """What own products take longer, as a share, by rows: as found here before, or measured.

    Whatever else the machine does only adds to a time. So what seems dear is looked at more often,
    and what was once found cheap is not asked again.
    """
    name = _file_name(wing, model)
    try:
        path = find_file(name)
        if path is not None:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return {int(rows): float(cost) for rows, cost in kept.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("kept costs of products can't be read, measuring again: %s", error)
    costs = wing.own_costs(model, _ROUNDS)
    if max(costs.values()) > _MAX_COST:
        costs = wing.own_costs(model, _MORE_ROUNDS)
    if max(costs.values()) <= _MAX_COST:
        with suppress(OSError):
            keep_file(name, lambda path: path.write_text(json.dumps(costs), encoding="utf-8"))
    return costs


def _file_name(wing: Wing, model: PreTrainedModel) -> str:
    shapes = Counter(
        str(list(module.weight.shape))
        for module in model.modules()
        if isinstance(module, wing.linear)
    )
    facts = [sorted(shapes.items()), str(model.dtype), wing.describe(), torch.__version__]
    key = hashlib.sha256(json.dumps([*facts, code_hash()], default=str).encode()).hexdigest()
    return f"products-{key[:16]}.json"


def _check_linear(model: PreTrainedModel, linear: type[nn.Module]) -> None:
    """Whether all products with weights are those of layers that a wing has its own for."""
    for module in model.modules():
        if type(module) is nn.Linear and linear is not nn.Linear:
            dtype = str(module.weight.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"batch_invariant: this processor has no products of packed weights in {dtype}"
            )
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if matrices and not isinstance(module, (nn.Embedding, linear)):
            raise UnsupportedModelError(
                f"batch_invariant: {type(module).__name__} has weights outside linear layers; "
                "their products may depend on what else is in the batch"
            )
