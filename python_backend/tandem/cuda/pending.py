"""Results that wait for what is done with them, to be computed in the same launch.

A norm's result that is added to a residual, or whose heads are rotated, needs no launch of its own.
But layers are transformers' code, and which of them do that nobody says. So a norm gives a tensor
that is still pending. Whatever is done with it, but what a kernel joins it with, computes it first:
any code gets what it would have got.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_map


class Work(Protocol):
    """What is still to be done with rows."""

    def finish(self, rows: Tensor) -> Tensor:
        """Does it."""

    def join(self, function: Callable[..., Any], rows: Tensor, other: Tensor) -> Tensor | None:
        """Does it, and adds or multiplies the result; None if no kernel does both.

        Args:
            function: `Tensor.add` or `Tensor.mul`.
        """


class Pending(Tensor):
    """What `work` makes of `rows`, once something asks for it."""

    rows: Tensor
    work: Work
    _made: Tensor | None

    @staticmethod
    def of(rows: Tensor, work: Work) -> Pending:
        """Rows `[..., dim]` that are not changed in place meanwhile."""
        pending = rows.as_subclass(Pending)
        pending.rows, pending.work, pending._made = rows, work, None
        return pending

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any of torch's functions, of a pending tensor."""
        if not kwargs:
            if func is Tensor.transpose and args[1:] == (1, 2) and args[0].rows.ndim == 4:
                return Pending.of(args[0].rows.transpose(1, 2), args[0].work)
            if func in (Tensor.add, Tensor.mul) and (joined := _joined(func, *args)) is not None:
                return joined
        return func(*tree_map(finished, args), **tree_map(finished, kwargs or {}))


def finished(value: Any) -> Any:
    """The tensor itself, if it is pending; anything else as it is."""
    if not isinstance(value, Pending):
        return value
    made: Tensor | None = vars(value)["_made"]
    if made is None:
        made = value._made = value.work.finish(value.rows)
    return made


def _joined(function: Callable[..., Any], one: Any, other: Any) -> Tensor | None:
    if not isinstance(one, Pending):
        one, other = other, one
    other = finished(other)
    if not isinstance(other, Tensor) or vars(one)["_made"] is not None:
        return None
    rows = one.rows
    if rows.shape != other.shape or rows.dtype != other.dtype or not rows.numel():
        return None
    work: Work = one.work
    return work.join(function, rows, other)
