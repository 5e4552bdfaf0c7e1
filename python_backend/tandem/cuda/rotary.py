"""Rotary embeddings in one launch, where transformers takes five for the query and for the key.

transformers' attention calls a function of its module, `apply_rotary_pos_emb`. A layer whose
function the kernel agrees with gets a `forward` of its own: the same code, for which that name
means the kernel. The module and all other models are as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
import triton
from torch import Tensor, nn

from tandem.cuda.attention import tile_of_heads
from tandem.cuda.kernels import rotate
from tandem.cuda.norms import FusedRMSNorm
from tandem.cuda.pending import Pending, finished

_NAME = "apply_rotary_pos_emb"
_PROBES = 3
# By rounding alone results may differ so much, relative to the largest; products may be fused.
_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# A decorator from here only renames arguments, and calls what it wraps.
_RENAMING = "transformers.utils.deprecation"


def fuse_rotary(model: nn.Module) -> None:
    """Lets each attention layer in `model` whose rotary embedding the kernel computes use it."""
    for module in model.modules():
        forward = _own_code(type(module).forward)
        if forward is None or _NAME not in forward.__code__.co_names:
            continue
        original: Any = forward.__globals__.get(_NAME)
        fused = _fused(original) if isinstance(original, FunctionType) else None
        if fused is not None and _agrees(fused, original, module):
            module.forward = MethodType(_with(forward, {_NAME: fused}), module)


def _own_code(forward: Any) -> FunctionType | None:
    """What is behind decorators; None if one does more than rename arguments."""
    while isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__"):
        if forward.__globals__.get("__name__") != _RENAMING:
            return None
        forward = forward.__wrapped__
    return forward if isinstance(forward, FunctionType) else None


def _with(function: FunctionType, names: dict[str, object]) -> FunctionType:
    """The same code, for which these global names mean something else."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _fused(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function that takes the same arguments, or None if they are others than the kernel's.

    What the kernel isn't for, like batches of padded sequences, is left to the original.
    """

    def rotate_both(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        if all(_fits(x, cos, sin, unsqueeze_dim) for x in (q, k)):
            return _rotated(q, k, cos, sin, unsqueeze_dim)
        both: tuple[Tensor, Tensor] = original(q, k, cos, sin, unsqueeze_dim)
        return both

    def rotate_one(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        if _fits(x, cos, sin, unsqueeze_dim):
            return _rotated(x, None, cos, sin, unsqueeze_dim)[0]
        rotated: Tensor = original(x, cos, sin, unsqueeze_dim)
        return rotated

    parameters = inspect.signature(original).parameters.values()
    for fused in (rotate_both, rotate_one):
        expected = inspect.signature(fused).parameters.values()
        if [(p.name, p.default) for p in parameters] == [(p.name, p.default) for p in expected]:
            return fused
    return None


@torch.no_grad()
def _agrees(fused: Callable[..., Any], original: Callable[..., Any], module: nn.Module) -> bool:
    """Whether both give the same for a few tokens of one head, in either order of dimensions."""
    head_dim = getattr(module, "head_dim", None)
    like = next(module.parameters(), None)
    if not isinstance(head_dim, int) or head_dim % 2 or like is None:
        return False
    if like.dtype not in _TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((4, 1, _PROBES, head_dim), generator=generator).to(like)
    *states, cos, sin = rows
    states = states[: len(inspect.signature(original).parameters) - 3]
    for dim in (1, 2):
        shaped = [each.unsqueeze(dim) for each in states]
        found, expected = (f(*shaped, cos, sin, unsqueeze_dim=dim) for f in (fused, original))
        for one, other in zip(found, expected, strict=True):
            difference = (one - other).abs().max()
            if not difference <= _TOLERANCE[like.dtype] * other.abs().max():
                return False
    return True


def _fits(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
    """Whether the kernel is for such tensors: a packed row, all of each head rotated."""
    x = x.rows if isinstance(x, Pending) else x
    if x.dim() != 4 or unsqueeze_dim not in (1, 2) or not x.numel():
        return False
    shape = (1, x.shape[3 - unsqueeze_dim], x.shape[3])
    return x.shape[0] == 1 and all(
        each.shape == shape and each.dtype == x.dtype and each.stride(2) == 1 for each in (cos, sin)
    )


def _is_normed(x: Any) -> bool:
    return isinstance(x, Pending) and isinstance(x.work, FusedRMSNorm)


def _rotated(
    q: Any, k: Any, cos: Tensor, sin: Tensor, heads_dim: int
) -> tuple[Tensor, Tensor | None]:
    tokens_dim = 3 - heads_dim
    norm, q_gain, k_gain = None, None, None
    if _is_normed(q) and (k is None or (_is_normed(k) and k.work.form == q.work.form)):
        norm, q_gain, q = q.work, q.work.gain, q.rows
        if k is not None:
            k_gain, k = k.work.gain, k.rows
    q, k = finished(q), finished(k)
    q = q if q.stride(3) == 1 else q.contiguous()
    k = k if k is None or k.stride(3) == 1 else k.contiguous()
    num_tokens, num_heads, head_dim = q.shape[tokens_dim], q.shape[heads_dim], q.shape[3]
    num_key_heads = 0 if k is None else k.shape[heads_dim]
    q_output = q.new_empty(1, num_tokens, num_heads, head_dim)
    k_output = None if k is None else k.new_empty(1, num_tokens, num_key_heads, head_dim)
    num_elements, tile_heads = tile_of_heads(head_dim, num_heads)
    num_tiles = triton.cdiv(num_heads, tile_heads) + triton.cdiv(num_key_heads, tile_heads)
    rotate[(num_tokens, num_tiles)](
        q,
        k,
        cos,
        sin,
        q_output,
        k_output,
        q_gain,
        k_gain,
        1.0 if norm is None else norm.form.eps,
        num_heads,
        num_key_heads,
        q.stride(tokens_dim),
        q.stride(heads_dim),
        0 if k is None else k.stride(tokens_dim),
        0 if k is None else k.stride(heads_dim),
        cos.stride(1),
        sin.stride(1),
        HEAD_DIM=head_dim,
        NUM_ELEMENTS=num_elements,
        TILE_HEADS=tile_heads,
        IS_NORMED=norm is not None,
        ROUNDS=norm is not None and norm.form.rounds,
        num_warps=4,
    )
    if heads_dim == 2:
        return q_output, k_output
    return q_output.transpose(1, 2), None if k_output is None else k_output.transpose(1, 2)
