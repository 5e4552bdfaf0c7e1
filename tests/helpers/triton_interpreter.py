"""The Triton language's interpreter, where it computes something else than a GPU would."""

from __future__ import annotations

from typing import Any

import pytest
from triton import knobs
from triton import language as tl
from triton.runtime import interpreter


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `tl.dot` multiply bfloat16; it would multiply their bits as integers."""
    if not knobs.runtime.interpret:
        return
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
    return interpreter.TensorHandle(data.view("float32"), tl.float32)
