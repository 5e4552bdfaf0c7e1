"""The kernel of `tandem.cuda.products`, in the Triton language."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    rows,  # [num_rows, SIZE], with a stride
    weight,  # [num_outputs, SIZE]
    bias,  # [num_outputs], or None
    output,  # [num_rows, num_outputs]
    num_rows,
    num_outputs,
    row_stride,
    SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_ELEMENTS: tl.constexpr,
    IS_FLOAT32: tl.constexpr,
):
    """A tile of a product with the weights of a linear layer, summed up from the first element."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    out = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    elements = tl.arange(0, TILE_ELEMENTS)
    row_places = row.to(tl.int64)[:, None] * row_stride
    out_places = out.to(tl.int64)[:, None] * SIZE
    sums = tl.zeros([TILE_ROWS, TILE_OUTPUTS], dtype=tl.float32)
    for start in range(0, SIZE, TILE_ELEMENTS):
        at = start + elements[None, :]
        is_there = at < SIZE
        mask = (row[:, None] < num_rows) & is_there
        some_rows = tl.load(rows + row_places + at, mask=mask, other=0.0)
        mask = (out[:, None] < num_outputs) & is_there
        some_weights = tl.load(weight + out_places + at, mask=mask, other=0.0)
        if IS_FLOAT32:
            sums = tl.dot(some_rows, tl.trans(some_weights), sums, input_precision="tf32x3")
        else:
            sums = tl.dot(some_rows, tl.trans(some_weights), sums)
    if bias is not None:
        sums += tl.load(bias + out, mask=out < num_outputs, other=0.0).to(tl.float32)[None, :]
    places = row.to(tl.int64)[:, None] * num_outputs + out[None, :]
    mask = (row[:, None] < num_rows) & (out[None, :] < num_outputs)
    tl.store(output + places, sums.to(output.dtype.element_ty), mask=mask)
