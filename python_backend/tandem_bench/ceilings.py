"""What the machine can do at best: read weights from memory, and multiply in bfloat16.

A decoding step can't be faster than reading all weights once; a pass over many tokens can't be
faster than its products. Both are measured with the operators that a model itself would use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tandem.cpu.packing import can_pack
from tandem_bench.figures import median
from tandem_bench.noise import foreign_share, read_rate
from tandem_bench.settings import Settings, bar

PART = "ceilings"
# The shape of Gemma 3's output head, and the rows of steps with one and more sequences and drafts.
_HEAD = (262_144, 640)
_ROWS = (1, 5, 16, 32, 80)
_SQUARE = 2048
_REPEATS = 15


def run(settings: Settings) -> None:
    """Measures, unless `ceilings.json` has it."""
    results = settings.results(PART, ())
    if PART not in results:
        with bar(PART, 1, results) as shown:
            results.put(PART, measure())
            shown.advance()


def measure() -> dict[str, Any]:
    """Medians of several repeats: GB/s of reading, GFLOP/s and milliseconds of products."""
    foreign = foreign_share()
    head = torch.randn(_HEAD, dtype=torch.bfloat16)
    head_seconds = {rows: product_seconds(head, rows) for rows in _ROWS}
    num_bytes = head.numel() * head.element_size()
    square = product_seconds(torch.randn(_SQUARE, _SQUARE, dtype=torch.bfloat16), _SQUARE)
    return {
        "read_gb_per_second": read_rate(),
        "head_read_gb_per_second": round(num_bytes / head_seconds[1] / 1e9, 1),
        "bf16_gflop_per_second": round(2e-9 * _SQUARE**3 / square),
        **{f"head_ms_{rows}_rows": round(1e3 * s, 2) for rows, s in head_seconds.items()},
        "threads": torch.get_num_threads(),
        "foreign_cpu_share": foreign(),
    }


def product_seconds(weight: Tensor, num_rows: int) -> float:
    """The median time of a linear layer, packed where the engine would pack it."""
    rows = torch.randn(num_rows, weight.shape[1], dtype=weight.dtype)
    work: Callable[[], Tensor] = partial(functional.linear, rows, weight)
    if can_pack(weight.device, weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        pointwise = torch.ops.mkldnn._linear_pointwise
        work = partial(pointwise, rows, packed, None, "none", [], "")
    work()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
