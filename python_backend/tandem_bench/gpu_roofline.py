"""What a step takes at best on data-centre GPUs: reckoned from shapes, on no GPU.

A program reads its weights, K/V and logits through the memory and multiplies at the rate of the
data sheet; the longer of the two is its limit. What it launches is counted on a model of the same
depth and small width, as the CUDA wing lays it out: launches don't depend on width.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tandem_bench.conditions import code_hash
from tandem_bench.gpu_engine import PAIRS, TINY, TINY_CHANGES, Pair, configs, layer_types
from tandem_bench.gpu_work import KINDS, Work, launches_of, work_of
from tandem_bench.meta_round import Load, MetaRound, fused, of_shape
from tandem_bench.tables import table

NUM_SEQUENCES = (1, 4, 16, 64)
CONTEXT = 1000
# What a launch takes at least: of the host in eager form, and of the device within a graph.
_FLOORS = {"eager": 5e-6, "graphs": 2e-6}
_DTYPE = torch.bfloat16
# The concurrency of the tables by operation.
_SHOWN = 16


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
_FILLED = 0.9


def _real_depth(pair: Pair) -> Pair:
    """The pair with all layers of the published model."""
    if not pair.name.startswith("12 of the 60"):
        return pair
    layers = {"num_hidden_layers": 60, "layer_types": layer_types(60, 6)}
    return replace(pair, name="Gemma 4 31B", verifier=pair.verifier | layers)


MODELS = tuple(map(_real_depth, PAIRS))


def run(
    output: Path,
    context: int = CONTEXT,
    models: Items[Pair] = MODELS,
    num_sequences: Items[int] = NUM_SEQUENCES,
) -> None:
    """Writes `roofline.json` and `roofline.md`.

    Args:
        output: the folder.
        context: tokens of each sequence before the step.
        num_sequences: that decode at once, 64 at most.
    """
    found: dict[str, Any] = {
        "reckoned": "from shapes and data sheets; nothing here was measured",
        "settings": _settings(context),
        "models": {},
    }
    for pair in models:
        found["models"][pair.name] = reckon(pair, context, num_sequences)
        print(f"{pair.name}: done", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / "roofline.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / "roofline.md").write_text(page(found), encoding="utf-8")
    print(f"written to {output / 'roofline.md'}")


def _settings(context: int) -> dict[str, Any]:
    packages = ("torch", "transformers")
    return {
        "context": context,
        "dtype": str(_DTYPE),
        "microseconds_of_a_launch": {n: round(1e6 * floor) for n, floor in _FLOORS.items()},
        "cards": [asdict(card) for card in CARDS],
        "code": code_hash(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def reckon(pair: Pair, context: int, num_sequences: Items[int]) -> dict[str, Any]:
    """All figures of one verifier and its assistant."""
    depth = len(pair.rates)
    shaped = of_shape(*configs(pair, {}, {}), _DTYPE, depth)
    small = fused(*configs(pair, small_sizes(pair), TINY_CHANGES), _DTYPE, depth)
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
        size += num_sequences * kept * shape.elements_per_token * _DTYPE.itemsize
    return size


def _step(works: dict[str, Work], tokens: float, size: int) -> dict[str, Any]:
    cards = {}
    for card in CARDS:
        limits = [card.seconds(work) for work in works.values()]
        seconds = {"limit": sum(max(limit) for limit in limits)}
        for name, floor in _FLOORS.items():
            seconds[name] = sum(
                max(*limit, work.num_launches * floor)
                for limit, work in zip(limits, works.values(), strict=True)
            )
        cards[card.name] = {
            "fits": size <= _FILLED * card.memory,
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


def page(found: dict[str, Any]) -> str:
    """All as Markdown."""
    settings = found["settings"]
    floors = settings["microseconds_of_a_launch"]
    cards = "; ".join(
        f"{card.name} {card.bandwidth / 1e12} TB/s, {card.flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{card.memory / 1e9:.0f} GB"
        for card in CARDS
    )
    text = [
        "# Reckoned, not measured\n",
        "Made by `scripts/gpu_roofline.py`, which needs no GPU and no weights.\n",
        f"Data sheets: {cards}. {settings['context']} tokens a sequence before the step; weights "
        "and K/V in bfloat16. At its **limit** a program takes as long as its bytes through the "
        "memory or its products at the full rate, whichever is longer; a step is its programs one "
        "behind the other. Activations between products count nothing, as if they stayed in the L2 "
        "cache, and so does what the host does between steps.\n",
        f"**Graphs**: at least {floors['graphs']} µs of the device for each launch of a program; "
        f"**eager**: at least {floors['eager']} µs of the host for each. Both are assumed. A dash: "
        f"weights and K/V don't fit into {_FILLED:.0%} of the memory.\n",
        "Launches are counted on a model of the same depth and of small width with random weights, "
        "as the CUDA wing lays it out at load; its kernels are noted and not run. An operation "
        "that torch computes by several kernels, such as a sort, counts as one launch.\n",
        f"Code {settings['code']}, torch {settings['torch']}, transformers "
        f"{settings['transformers']}.\n",
    ]
    for name, model in found["models"].items():
        text += [f"## {name}\n", *_model_page(model)]
    return "\n".join(text)


def _model_page(model: dict[str, Any]) -> Iterator[str]:
    yield f"{model['acceptance']}; {model['weight_bytes'] / 1e9:.1f} GB of weights.\n"
    for card in CARDS:
        yield f"Tokens a second on an {card.name}, reckoned:\n"
        yield tokens_table(model, card)
    yield "A step by program, reckoned:\n"
    yield _programs_table(model)
    shown = [key for key in model["steps"] if key.endswith(f", {_SHOWN}")]
    for key in shown or list(model["steps"])[-2:]:
        programs = model["steps"][key]["programs"]
        yield f"Launches of a step, {key} sequences:\n"
        yield _launches_table(programs)
        yield f"Bytes and products of what has any, {key} sequences:\n"
        yield _operations_table(programs)


def tokens_table(model: dict[str, Any], card: Card) -> str:
    """A row for each concurrency: plain decoding, drafts, and what these bring."""
    steps, forms = model["steps"], ("limit", *reversed(_FLOORS))
    rows = []
    for count in dict.fromkeys(key.split(", ")[1] for key in steps):
        plain, drafted = (steps[f"{name}, {count}"]["cards"][card.name] for name in ("none", "mtp"))
        rates = [each["tokens_per_second"] for each in (plain, drafted)]
        row = [count, *(_number(each, form) for each in (plain, drafted) for form in forms)]
        fits = plain["fits"] and drafted["fits"]
        row += [f"{rates[1][form] / rates[0][form]:.2f}" if fits else "-" for form in forms]
        rows.append(row)
    names = [f"{name}, {form}" for name in ("none", "mtp", "ratio") for form in forms]
    return table(["sequences", *names], rows)


def _number(cell: dict[str, Any], form: str) -> str:
    return f"{cell['tokens_per_second'][form]:,.0f}" if cell["fits"] else "-"


def _programs_table(model: dict[str, Any]) -> str:
    header = ["drafter, sequences: program", "launches", *(f"{n}, ms" for n in _FLOORS)]
    header += [f"{kind.replace('kv', 'K/V')}, GB" for kind in KINDS]
    header += ["TFLOP", *(f"{card.name} memory, ms" for card in CARDS), "products, ms"]
    rows = []
    for key, step in model["steps"].items():
        for number, (name, work) in enumerate(step["programs"].items()):
            launches = sum(work["launches"].values())
            cards = [step["cards"][card.name] for card in CARDS]
            rows.append(
                [
                    f"{key}: {name}",
                    launches,
                    *(f"{1e3 * launches * floor:.1f}" for floor in _FLOORS.values()),
                    *(f"{work['bytes'][kind] / 1e9:.2f}" for kind in KINDS),
                    f"{work['flops'] / 1e12:.3f}",
                    *(f"{card['ms_memory'][number]:.2f}" for card in cards),
                    f"{cards[0]['ms_products'][number]:.2f}",
                ]
            )
    return table(header, rows)


def _launches_table(programs: dict[str, dict[str, Any]]) -> str:
    totals: dict[str, int] = {}
    for work in programs.values():
        for name, count in work["launches"].items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda name: -totals[name])
    rows: list[list[Any]] = [
        [f"`{name}`", *(work["launches"].get(name, 0) for work in programs.values())]
        for name in names
    ]
    rows.append(["all", *(sum(work["launches"].values()) for work in programs.values())])
    return table(["operation", *programs], rows)


def _operations_table(programs: dict[str, dict[str, Any]]) -> str:
    rows = [
        [f"{program}: `{name}`", f"{size / 1e6:,.1f}", f"{flops / 1e9:,.1f}"]
        for program, work in programs.items()
        for name, (size, flops) in work["by_operation"].items()
    ]
    return table(["", "MB", "GFLOP"], rows)
