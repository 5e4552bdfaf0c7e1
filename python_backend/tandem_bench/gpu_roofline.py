"""What a step takes at best on data-centre GPUs: reckoned from shapes, on no GPU.

A program reads its weights, K/V and logits through the memory and multiplies at the rate of the
data sheet; the longer of the two is its limit. What it launches is counted on a model of the same
depth and small width, as the CUDA wing lays it out: launches don't depend on width.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tandem_bench.gpu_engine import PAIRS, TINY, TINY_CHANGES, Pair, configs, layer_types
from tandem_bench.gpu_work import Work, launches_of, work_of
from tandem_bench.meta_round import Load, MetaRound, fused, of_shape

NUM_SEQUENCES = (1, 4, 16, 64)
CONTEXT = 1000
# What a launch takes at least: of the host in eager form, and of the device within a graph.
FLOORS = {"eager": 5e-6, "graphs": 2e-6}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: bytes a second, dense bfloat16 operations a second, and bytes."""

    name: str
    bandwidth: float
    flops: float
    memory: float

    def seconds(self, work: Work) -> tuple[float, float]:
        """At the memory's limit, and at that of products."""
        return work.num_bytes / self.bandwidth, work.flops / self.flops


CARDS = (
    Card("H100 SXM", 3.35e12, 989e12, 80e9),
    Card("H200 SXM", 4.8e12, 989e12, 141e9),
)
# Of a card's memory, what `gpu_memory_utilization` fills.
FILLED = 0.9


def _real_depth(pair: Pair) -> Pair:
    """The pair with all layers of the published model."""
    if not pair.name.startswith("12 of the 60"):
        return pair
    layers = {"num_hidden_layers": 60, "layer_types": layer_types(60, 6)}
    return replace(pair, name="Gemma 4 31B", verifier=pair.verifier | layers)


MODELS = tuple(map(_real_depth, PAIRS))


def reckon(pair: Pair, context: int, num_sequences: Items[int]) -> dict[str, Any]:
    """All figures of one verifier and its assistant."""
    depth = len(pair.rates)
    shaped = of_shape(*configs(pair, {}, {}), DTYPE, depth)
    small = fused(*configs(pair, small_sizes(pair), TINY_CHANGES), DTYPE, depth)
    length = 1 + sum(pair.rates)
    steps = {}
    for count in num_sequences:
        for name, num_drafts in (("none", 0), ("mtp", depth)):
            load = Load(count, num_drafts)
            works = work_of(shaped, load, context)
            for program, launches in launches_of(small.programs(load)).items():
                works[program].launches = launches
            size = footprint(shaped, count, context + num_drafts)
            tokens = count * (length if num_drafts else 1)
            steps[f"{name}, {count}"] = _step(works, tokens, size)
    return {
        "acceptance": f"mean length {length:.2f} with {depth} drafts ({pair.said})",
        "weight_bytes": footprint(shaped, 0, 0),
        "steps": steps,
    }


def small_sizes(pair: Pair) -> dict[str, Any]:
    """Widths for a model that launches what the pair does: where it has one KV head, so has this.

    With one head some tensors are contiguous that otherwise have to be copied.
    """
    sizes = dict(TINY)
    for name in ("num_key_value_heads", "num_global_key_value_heads"):
        if name in pair.verifier:
            sizes[name] = min(2, pair.verifier[name])
    return sizes


def footprint(shaped: MetaRound, num_sequences: int, length: int) -> int:
    """Bytes of weights, and of the K/V that sequences of this length keep."""
    parameters = {p for m in (shaped.verifier, shaped.assistant) for p in m.parameters()}
    size = sum(p.numel() * p.element_size() for p in parameters)
    for shape in shaped.shapes:
        kept = min(length, shape.window or length)
        size += num_sequences * kept * shape.elements_per_token * DTYPE.itemsize
    return size


def _step(works: dict[str, Work], tokens: float, size: int) -> dict[str, Any]:
    cards = {}
    for card in CARDS:
        limits = [card.seconds(work) for work in works.values()]
        seconds = {"limit": sum(max(limit) for limit in limits)}
        for name, floor in FLOORS.items():
            seconds[name] = sum(
                max(*limit, work.num_launches * floor)
                for limit, work in zip(limits, works.values(), strict=True)
            )
        cards[card.name] = {
            "fits": size <= FILLED * card.memory,
            "ms_memory": [round(1e3 * memory, 4) for memory, _ in limits],
            "ms_products": [round(1e3 * products, 4) for _, products in limits],
            "ms": {name: round(1e3 * value, 4) for name, value in seconds.items()},
            "tokens_per_second": {name: round(tokens / s, 1) for name, s in seconds.items()},
        }
    return {
        "programs": {name: asdict(work) for name, work in works.items()},
        "tokens": round(tokens, 3),
        "memory_bytes": size,
        "launches": sum(work.num_launches for work in works.values()),
        "cards": cards,
    }
