"""What the machine can do at best: read weights from memory, and multiply in bfloat16.

A decoding step can't be faster than reading all weights once; a pass over many tokens can't be
faster than its products. Both are measured with the operators that a model itself would use.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tandem_bench.noise import foreign_share
from tandem_bench.settings import Settings, bar

# The shape of Gemma 3's output head, the largest matrix that a step reads: 335 MB, far more than
# any cache holds.
_WEIGHT = (262_144, 640)
_SQUARE = 2048
_REPEATS = 15


PART = "ceilings"


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
    weight = torch.randn(_WEIGHT, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    num_bytes = weight.numel() * weight.element_size()
    as_integers = weight.view(torch.int64)
    square = torch.randn(_SQUARE, _SQUARE, dtype=torch.bfloat16)
    packed_square = torch.ops.mkldnn._reorder_linear_weight(square, _SQUARE)

    def seconds(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def product(rows: int, matrix: torch.Tensor, width: int) -> float:
        x = torch.randn(rows, width, dtype=torch.bfloat16)
        return seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], ""))

    read = seconds(lambda: as_integers.amax())
    head = {rows: product(rows, packed, _WEIGHT[1]) for rows in (1, 5, 16, 32, 80)}
    rate = 2 * _SQUARE**3 / product(_SQUARE, packed_square, _SQUARE)
    return {
        "read_gb_per_second": round(num_bytes / read / 1e9, 2),
        "bf16_gflop_per_second": round(rate / 1e9, 1),
        **{f"head_ms_{rows}_rows": round(1e3 * value, 2) for rows, value in head.items()},
        "head_read_gb_per_second": round(num_bytes / head[1] / 1e9, 2),
        "threads": torch.get_num_threads(),
        "foreign_cpu_share": foreign(),
    }
