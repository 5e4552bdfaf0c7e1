"""Sampling on a GPU: four launches, whose shapes depend on no data.

It chooses the tokens of `tandem.sampling.sample`, on whose page the law is: the noise has the same
bits, scores are rounded alike, and candidates whose noise can't make them win get none. One thing
is not the same to the last bit: the sums of top-p, so that a token whose share ends within some
millionths of `top_p` may be in on one device and out on the other.

Of each block of 256 candidates the largest logit is found first. One program a row then looks for
the lowest score that the filters let through, without sorting: by bisection over the numbers'
bits, among the candidates of blocks that matter. What is left gets its noise in chunks of blocks.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tandem.cuda.sampling_kernels import (
    BLOCK,
    find_bounds,
    find_maxima,
    find_winners,
    join_winners,
)

# Blocks of a program that reads a part of a row.
_CHUNK_BLOCKS = 8
# Candidates that are read at once by the program that searches a row.
_TILE = 2048
_NUM_WARPS = 8
# More than any kernel takes, and few enough for two programs at once on a multiprocessor.
_MAX_REGISTERS = 128
# A product and a sum would else be rounded once, and not as on a CPU.
_OPTIONS = {"num_warps": _NUM_WARPS, "maxnreg": _MAX_REGISTERS, "enable_fp_fusion": False}


def choose(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    token_ids: Tensor | None = None,
) -> Tensor:
    """Chooses one candidate a row, as `tandem.sampling.sample` does; fits into a CUDA graph.

    Sources: Maddison, Tarlow and Minka, "A* sampling", 2014, for noise from the top down; Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", 2014.

    Args:
        logits: `[num_rows, num_candidates]`, float32, float16 or bfloat16; a row's are contiguous.
        seeds: `[num_rows]`, int64, as are the following where no other type is named.
        positions: a token's index in its sequence.
        temperatures: float32; 0 takes the likeliest candidate, the first of equals.
        top_k: 0 and less, or `num_candidates` and more, for no limit.
        top_p: float32; 1 and more for no limit.
        log_min_p: float32, the logarithm of min-p; -infinity for no limit.
        token_ids: which token each candidate is, int64, `[num_candidates]` or `[num_rows,
            num_candidates]`; candidate i is token i when not given.

    Returns:
        Indices of candidates, int64, `[num_rows]`; -1 where a row's largest logit is not finite.
    """
    assert logits.stride(1) == 1
    assert token_ids is None or token_ids.stride(-1) == 1
    num_rows, num_candidates = logits.shape
    num_blocks = triton.cdiv(num_candidates, BLOCK.value)
    num_chunks = triton.cdiv(num_blocks, _CHUNK_BLOCKS)
    maxima = logits.new_empty(num_rows, num_blocks, dtype=torch.float32)
    masses = logits.new_empty(num_rows, num_blocks, dtype=torch.float32)
    listed = logits.new_empty(num_rows, num_blocks, dtype=torch.int32)
    found = logits.new_empty(num_rows, num_candidates, dtype=torch.float32)
    bounds = logits.new_empty(num_rows, 2, dtype=torch.float32)
    winner_scores = logits.new_empty(num_rows, num_chunks, dtype=torch.float32)
    winners = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    chosen = logits.new_empty(num_rows, dtype=torch.int64)
    row_stride = logits.stride(0)
    ids_stride = token_ids.stride(0) if token_ids is not None and token_ids.dim() == 2 else 0
    find_maxima[(num_chunks, num_rows)](
        logits,
        temperatures,
        top_k,
        top_p,
        maxima,
        masses,
        row_stride,
        num_candidates,
        num_blocks,
        CHUNK_BLOCKS=_CHUNK_BLOCKS,
        **_OPTIONS,
    )
    find_bounds[(num_rows,)](
        logits,
        seeds,
        positions,
        temperatures,
        top_k,
        top_p,
        log_min_p,
        token_ids,
        maxima,
        masses,
        listed,
        found,
        bounds,
        chosen,
        row_stride,
        ids_stride,
        num_candidates,
        num_blocks,
        NUM_BLOCKS=triton.next_power_of_2(num_blocks),
        TILE=_TILE,
        **_OPTIONS,
    )
    find_winners[(num_chunks, num_rows)](
        logits,
        seeds,
        positions,
        temperatures,
        token_ids,
        maxima,
        bounds,
        chosen,
        winner_scores,
        winners,
        row_stride,
        ids_stride,
        num_candidates,
        num_blocks,
        CHUNK_BLOCKS=_CHUNK_BLOCKS,
        **_OPTIONS,
    )
    join_winners[(num_rows,)](
        temperatures,
        winner_scores,
        winners,
        chosen,
        num_candidates,
        num_chunks,
        NUM_CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=1,
    )
    return chosen
