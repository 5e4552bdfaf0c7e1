"""Kernels of sampling in the Triton language; see `sampling.py` for what they compute together.

`TRITON_INTERPRET=1`, set before this is imported, runs them on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tokens whose noise has a known largest, as in `tandem.sampling.noise`.
BLOCK = tl.constexpr(256)
# SplitMix64's.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_SCALE = tl.constexpr(2**-32)
_SHARE = tl.constexpr(1 / BLOCK.value)
# Above all noise: the smallest exponential variable is 2**-33 / BLOCK.
_MAX_NOISE = tl.constexpr(28.5)
_INF = tl.constexpr(float("inf"))


@triton.jit
def splitmix64(state, index):
    """Output number `index` of the stream that starts at `state`; all uint64."""
    z = state + (index + 1) * _GAMMA
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    return z ^ (z >> 31)


@triton.jit
def exponential(bits):
    """Exponential variables, float64, from the upper halves of `bits`."""
    uniform = ((bits >> 32).to(tl.float64) + 0.5) * _SCALE
    return -tl.log(1.0 - uniform)


@triton.jit
def block_exponential(key, block):
    """The smallest exponential variable of a block's tokens, and which of them has it."""
    bits = splitmix64(key, (-1 - block).to(tl.uint64))
    return exponential(bits) * _SHARE, (bits & (BLOCK - 1)).to(tl.int32)


@triton.jit
def gumbel(key, token, smallest, owner):
    """Gumbel noise, float32, of tokens whose block has `smallest` and `owner`."""
    others = smallest + exponential(splitmix64(key, token.to(tl.uint64)))
    chosen = tl.where((token % BLOCK).to(tl.int32) == owner, smallest, others)
    return (-tl.log(chosen)).to(tl.float32)


@triton.jit
def _key_of(seeds, positions, row):
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    return splitmix64(seed.to(tl.uint64), position.to(tl.uint64))


@triton.jit
def find_maxima(
    logits,  # [num_rows, num_candidates], with a stride
    temperatures,
    top_k,
    top_p,
    maxima,  # [num_rows, num_blocks], float32
    masses,
    row_stride,
    num_candidates,
    num_blocks,
    CHUNK_BLOCKS: tl.constexpr,
):
    """The largest logit of each block, or NaN if one is, and what top-p needs of the others."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = chunk * CHUNK_BLOCKS + tl.arange(0, CHUNK_BLOCKS)
    candidates = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_there = candidates < num_candidates
    places = logits + row * row_stride + candidates
    values = tl.load(places, mask=is_there, other=-_INF).to(tl.float32)
    best = tl.max(values, 1)
    is_broken = tl.max((values != values).to(tl.int32), 1) > 0
    places = row * num_blocks + blocks
    tl.store(maxima + places, tl.where(is_broken, float("nan"), best), mask=blocks < num_blocks)
    temperature, k = tl.load(temperatures + row), tl.load(top_k + row)
    is_limited = (k > 0) & (k < num_candidates)
    if (tl.load(top_p + row) < 1) & (temperature > 0) & (not is_limited):
        scores = tl.div_rn(values, temperature)
        best = tl.div_rn(best, temperature)
        # Nothing is measured by the best where it isn't finite: where all is forbidden, say.
        best = tl.where((best == -_INF) | (best == _INF), 0.0, best)
        mass = tl.sum(tl.exp(scores - best[:, None]), 1)
        tl.store(masses + places, mass, mask=blocks < num_blocks)


@triton.jit
def _key(score):
    """Integers, int64, in the order of float32 numbers; both zeros have one."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _score(key):
    """The number with this key."""
    size = tl.abs(key).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -size, size)


@triton.jit
def _weights(scores, best, BY_MASS: tl.constexpr):
    return tl.exp(scores - best) if BY_MASS else tl.full(scores.shape, 1.0, tl.float32)


@triton.jit
def _collect(
    found,  # gets the scores
    listed,  # gets the blocks
    logits,  # of this row
    block_scores,
    temperature,
    lowest,
    best,
    num_candidates,
    NUM_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Lists a row's finite scores from `lowest` on; how many, and their mass."""
    is_needed = (block_scores >= lowest) & (block_scores > -_INF)
    places = tl.cumsum(is_needed.to(tl.int32), 0) - 1
    tl.debug_barrier()
    tl.store(listed + places, tl.arange(0, NUM_BLOCKS), mask=is_needed)
    num_listed = tl.sum(is_needed.to(tl.int32), 0) * BLOCK
    tl.debug_barrier()
    num_found = 0
    mass = tl.full([], 0.0, tl.float64)
    for at in range(0, num_listed, TILE):
        offsets = at + tl.arange(0, TILE)
        block = tl.load(listed + offsets // BLOCK, mask=offsets < num_listed, other=0)
        candidates = block * BLOCK + offsets % BLOCK
        is_there = (offsets < num_listed) & (candidates < num_candidates)
        values = tl.load(logits + candidates, mask=is_there, other=-_INF).to(tl.float32)
        scores = tl.div_rn(values, temperature)
        is_found = (scores >= lowest) & (scores > -_INF)
        after = num_found + tl.cumsum(is_found.to(tl.int32), 0)
        tl.store(found + after - 1, scores, mask=is_found)
        num_found += tl.sum(is_found.to(tl.int32), 0)
        mass += tl.sum(tl.where(is_found, tl.exp(scores - best), 0.0), 0).to(tl.float64)
    tl.debug_barrier()
    return num_found, mass


@triton.jit
def _search(
    found,
    num_found,
    lowest,
    best,
    needed,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest score, from `lowest` to `best`, that so much of the list reaches.

    By bisection; in each round the list, of which nothing is left in the end, loses what is known
    to be in or out.
    """
    low, high = _key(lowest), _key(best) + 1
    num_left = num_found
    above = tl.full([], 0.0, tl.float64)
    while (high - low > 1) & (num_left > 1):
        middle = (low + high) >> 1
        least, most, threshold = _score(low), _score(high), _score(middle)
        reached = above
        num_kept = 0
        for at in range(0, num_left, TILE):
            offsets = at + tl.arange(0, TILE)
            scores = tl.load(found + offsets, mask=offsets < num_left, other=-_INF)
            is_kept = (offsets < num_left) & (scores >= least) & (scores < most)
            places = num_kept + tl.cumsum(is_kept.to(tl.int32), 0) - 1
            # All have read before any writes.
            tl.debug_barrier()
            tl.store(found + places, scores, mask=is_kept)
            num_kept += tl.sum(is_kept.to(tl.int32), 0)
            weights = _weights(scores, best, BY_MASS)
            more = tl.where(is_kept & (scores >= threshold), weights, 0.0)
            reached += tl.sum(more, 0).to(tl.float64)
        tl.debug_barrier()
        num_left = num_kept
        if reached.to(tl.float32) >= needed:
            low = middle
        else:
            high = middle
            above = reached
    return _score(low)


@triton.jit
def find_bounds(
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
    listed,  # [num_rows, num_blocks], int32
    found,  # [num_rows, num_candidates], float32
    bounds,  # [num_rows, 2], float32: the floor of scores, and what is to be beaten with noise
    chosen,  # [num_rows], int64
    row_stride,
    ids_stride,
    num_candidates,
    num_blocks,
    NUM_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of one row the likeliest candidate, -1 if it isn't finite, and for noise the bounds."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    maxima += row * num_blocks
    masses += row * num_blocks
    listed += row * num_blocks
    found += row * num_candidates
    blocks = tl.arange(0, NUM_BLOCKS)
    values = tl.load(maxima + blocks, mask=blocks < num_blocks, other=-_INF)
    is_broken = tl.max((values != values).to(tl.int32), 0) > 0
    best_logit = tl.max(tl.where(values != values, -_INF, values), 0)
    if is_broken | (best_logit == _INF) | (best_logit == -_INF):
        tl.store(chosen + row, tl.full([], -1, tl.int64))
        return
    block = tl.min(tl.where(values == best_logit, blocks, num_blocks), 0)
    candidates = block * BLOCK + tl.arange(0, BLOCK)
    near = tl.load(logits + candidates, mask=candidates < num_candidates, other=-_INF)
    is_best = near.to(tl.float32) == best_logit
    index = tl.min(tl.where(is_best, candidates, num_candidates), 0)
    tl.store(chosen + row, index.to(tl.int64))
    temperature = tl.load(temperatures + row)
    if temperature == 0:
        return

    best = tl.div_rn(best_logit, temperature)
    k, share = tl.load(top_k + row), tl.load(top_p + row)
    is_limited = (k > 0) & (k < num_candidates)
    floor = tl.full([], float("-inf"), tl.float32)
    scores = tl.div_rn(values, temperature)
    if is_limited:
        # The k-th largest score is no less than the k-th largest of the blocks'.
        tl.store(found + blocks, scores, mask=blocks < num_blocks)
        tl.debug_barrier()
        needed = k.to(tl.float32)
        floor = _search(found, num_blocks, floor, best, needed, False, TILE)
        num_found, _ = _collect(
            found,
            listed,
            logits,
            scores,
            temperature,
            floor,
            best,
            num_candidates,
            NUM_BLOCKS,
            TILE,
        )
        floor = _search(found, num_found, floor, best, needed, False, TILE)
    if share < 1:
        lowest = floor
        total = tl.full([], 0.0, tl.float32)
        if not is_limited:
            parts = tl.load(masses + blocks, mask=blocks < num_blocks, other=0.0)
            total = tl.sum(parts * tl.exp(scores - best), 0)
            # All that is further below the best has half of what top-p leaves out, at most.
            lowest = best + tl.log((1 - share) * total / (2.0 * num_candidates))
            lowest = tl.minimum(lowest, best)
        num_found, mass = _collect(
            found,
            listed,
            logits,
            scores,
            temperature,
            lowest,
            best,
            num_candidates,
            NUM_BLOCKS,
            TILE,
        )
        if is_limited:
            total = mass.to(tl.float32)
        floor = _search(found, num_found, lowest, best, share * total, True, TILE)
    floor = tl.maximum(floor, best + tl.load(log_min_p + row))
    key = _key_of(seeds, positions, row)
    token = index.to(tl.int64)
    if token_ids is not None:
        token = tl.load(token_ids + row * ids_stride + index)
    smallest, owner = block_exponential(key, token // BLOCK)
    tl.store(bounds + 2 * row, floor)
    tl.store(bounds + 2 * row + 1, best + gumbel(key, token, smallest, owner))


@triton.jit
def find_winners(
    logits,
    seeds,
    positions,
    temperatures,
    token_ids,
    maxima,
    bounds,
    chosen,
    winner_scores,  # [num_rows, num_chunks], float32
    winners,  # [num_rows, num_chunks], int32
    row_stride,
    ids_stride,
    num_candidates,
    num_blocks,
    CHUNK_BLOCKS: tl.constexpr,
):
    """Of one chunk the largest score under noise, and the first candidate that has it."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if (temperature == 0) | (tl.load(chosen + row) < 0):
        return
    place = row * tl.num_programs(0) + chunk
    floor, to_beat = tl.load(bounds + 2 * row), tl.load(bounds + 2 * row + 1)
    blocks = chunk * CHUNK_BLOCKS + tl.arange(0, CHUNK_BLOCKS)
    best = tl.load(maxima + row * num_blocks + blocks, mask=blocks < num_blocks, other=-_INF)
    best = tl.div_rn(best, temperature)
    key = _key_of(seeds, positions, row)
    if token_ids is None:
        smallest, owner = block_exponential(key, blocks.to(tl.int64))
        limit = (-tl.log(smallest)).to(tl.float32)
    else:
        limit = _MAX_NOISE
    is_live = (best >= floor) & (best + limit >= to_beat)
    if tl.max(is_live.to(tl.int32), 0) == 0:
        tl.store(winner_scores + place, float("-inf"))
        tl.store(winners + place, 0)
        return
    candidates = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_there = is_live[:, None] & (candidates < num_candidates)
    places = logits + row * row_stride + candidates
    scores = tl.load(places, mask=is_there, other=-_INF).to(tl.float32)
    scores = tl.div_rn(scores, temperature)
    if token_ids is None:
        tokens = candidates.to(tl.int64)
        smallest, owner = smallest[:, None], owner[:, None]
    else:
        tokens = tl.load(token_ids + row * ids_stride + candidates, mask=is_there, other=0)
        smallest, owner = block_exponential(key, tokens // BLOCK)
    # That candidates have noise which no bound rules out is enough: they lose by themselves.
    is_live = is_there & (scores >= floor)
    perturbed = scores + gumbel(key, tokens, smallest, owner)
    perturbed = tl.where(is_live, perturbed, -_INF)
    largest = tl.max(perturbed)
    is_first = is_live & (perturbed == largest)
    winner = tl.min(tl.where(is_first, candidates, num_candidates))
    tl.store(winner_scores + place, largest)
    tl.store(winners + place, winner)


@triton.jit
def join_winners(
    temperatures,
    winner_scores,
    winners,
    chosen,
    num_candidates,
    num_chunks,
    NUM_CHUNKS: tl.constexpr,
):
    """The best of a row's chunks, the first of equals."""
    row = tl.program_id(0).to(tl.int64)
    if (tl.load(temperatures + row) == 0) | (tl.load(chosen + row) < 0):
        return
    chunks = tl.arange(0, NUM_CHUNKS)
    is_there = chunks < num_chunks
    found = tl.load(winner_scores + row * num_chunks + chunks, mask=is_there, other=-_INF)
    candidates = tl.load(winners + row * num_chunks + chunks, mask=is_there, other=0)
    is_first = is_there & (found == tl.max(found, 0))
    winner = tl.min(tl.where(is_first, candidates, num_candidates), 0)
    tl.store(chosen + row, winner.to(tl.int64))
