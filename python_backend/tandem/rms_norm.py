"""Which way a model's RMSNorm uses its weight: found out, for a norm says so nowhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

_PROBES = 4
# Of a norm without weight, which takes rows of any size.
_ANY_DIM = 64
# By rounding alone two ways of summing may differ so much, relative to the result.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Form(NamedTuple):
    """How a norm computes.

    Attributes:
        eps: what is added to the mean square.
        offset: what is added to the weight; 1 in Gemma 3; None without weight.
        rounds: whether the quotient is rounded before it is multiplied.
    """

    eps: float
    offset: float | None
    rounds: bool


class FusedNorm(nn.Module):
    """Stands in for a norm, and keeps what it multiplies by in float32."""

    def __init__(self, norm: nn.Module, form: Form) -> None:
        """Takes the transformers module, which stays within reach, and its form."""
        super().__init__()
        self.norm = norm
        self._form = form
        self._gain: Tensor | None = None
        if form.offset is not None:
            self._gain = self.weight.detach().float() + form.offset

    @property
    def weight(self) -> Tensor:
        """`[dim]`."""
        return self.norm.get_parameter("weight")


Fuse = Callable[[nn.Module, Form], nn.Module | None]


def replace_norms(model: nn.Module, fused: Fuse) -> None:
    """Replaces each RMSNorm in `model` that `fused` computes as well.

    Args:
        fused: makes a module that computes what a norm of a form does, or None if it can't.
    """
    like = next(model.parameters(), None)
    if like is None:
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _fused(child, fused, like) or child)


@torch.no_grad()
def _fused(norm: nn.Module, fused: Fuse, like: Tensor) -> nn.Module | None:
    """One that gives the same for a few rows, which are as `like` where the norm has no weight."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    offsets: tuple[float | None, ...] = (0.0, 1.0)
    if not norm.state_dict():
        weight, offsets = like.new_empty(_ANY_DIM), (None,)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.dtype not in _TOLERANCE:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((_PROBES, len(weight)), generator=generator).to(weight)
    expected = norm(probe)
    for offset, rounds in itertools.product(offsets, (False, True)):
        module = fused(norm, Form(eps, offset, rounds))
        if module is None:
            return None
        difference = (module(probe) - expected).float().abs()
        if bool((difference <= _TOLERANCE[weight.dtype] * expected.float().abs()).all()):
            return module
    return None
