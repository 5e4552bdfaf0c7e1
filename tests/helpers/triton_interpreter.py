"""The Triton language's interpreter, where it computes something else than a GPU would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton import knobs
from triton import language as tl
from triton.runtime import interpreter


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `tl.dot` multiply bfloat16, whose bits it would multiply as integers, and rounds to it.

    It would cut off what bfloat16 has no place for.
    """
    if not knobs.runtime.interpret:
        return
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    convert = interpreter._convert_float

    def convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(values, copy=True).view(np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
    return interpreter.TensorHandle(data.view("float32"), tl.float32)
