"""The sheet of what a step on a GPU takes at best: every figure, and tables of them."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem_bench.conditions import code_hash
from tandem_bench.gpu_engine import Pair
from tandem_bench.gpu_roofline import (
    CARDS,
    CONTEXT,
    DTYPE,
    FILLED,
    FLOORS,
    MODELS,
    NUM_SEQUENCES,
    reckon,
)
from tandem_bench.gpu_work import KINDS
from tandem_bench.tables import table

# The concurrency of the tables by operation.
_SHOWN = 16


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
        "dtype": str(DTYPE),
        "microseconds_of_a_launch": {n: round(1e6 * floor) for n, floor in FLOORS.items()},
        "cards": [asdict(card) for card in CARDS],
        "code": code_hash(),
        **{name: importlib.metadata.version(name) for name in packages},
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
        f"**eager**: at least {floors['eager']} µs of the host for each. Both are assumed. What is "
        f"not there doesn't fit into {FILLED:.0%} of the memory.\n",
        "Launches are counted on a model of the same depth and of small width with random weights, "
        "as the CUDA wing lays it out at load; its kernels are noted and not run. An operation "
        "that torch computes by several kernels, such as a sort, counts as one launch.\n",
        f"Code {settings['code']}, torch {settings['torch']}, transformers "
        f"{settings['transformers']}.\n",
    ]
    text += ["Launches of a step with drafts:\n", counts_table(found)]
    text += ["Tokens a second, reckoned:\n", main_table(found)]
    for name, model in found["models"].items():
        text += [f"## {name}\n", *_model_page(model)]
    return "\n".join(text)


def _model_page(model: dict[str, Any]) -> Iterator[str]:
    yield f"{model['acceptance']}; {model['weight_bytes'] / 1e9:.1f} GB of weights.\n"
    yield "A step by program, reckoned:\n"
    yield _programs_table(model)
    shown = [key for key in model["steps"] if key.endswith(f", {_SHOWN}")]
    for key in shown or list(model["steps"])[-2:]:
        programs = model["steps"][key]["programs"]
        yield f"Launches of a step, {key} sequences:\n"
        yield _launches_table(programs)
        yield f"Bytes and products of what has any, {key} sequences:\n"
        yield _operations_table(programs)


def main_table(found: dict[str, Any]) -> str:
    """Tokens a second of all models and cards: plain decoding, drafts, and what these bring."""
    forms = ("limit", *reversed(FLOORS))
    rows = []
    for name, model in found["models"].items():
        steps = model["steps"]
        for card in found["settings"]["cards"]:
            for count in dict.fromkeys(key.split(", ")[1] for key in steps):
                plain, drafted = (
                    steps[f"{drafter}, {count}"]["cards"][card["name"]]
                    for drafter in ("none", "mtp")
                )
                row = [f"{name}, {card['name']}, {count}"]
                for form in forms:
                    rates = [each["tokens_per_second"][form] for each in (plain, drafted)]
                    row += [*(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}"]
                if plain["fits"] and drafted["fits"]:
                    rows.append(row)
    columns = [f"{form}: {name}" for form in forms for name in ("none", "mtp", "ratio")]
    return table(["sequences", *columns], rows)


def counts_table(found: dict[str, Any]) -> str:
    """Launches of a step with drafts, by program."""
    rows = []
    for name, model in found["models"].items():
        step = list(model["steps"].values())[-1]
        counts = [sum(work["launches"].values()) for work in step["programs"].values()]
        rows.append([name, *(f"{count:,}" for count in (*counts, step["launches"]))])
    return table(["launches", "draft", "verify", "accept", "all"], rows)


def _programs_table(model: dict[str, Any]) -> str:
    header = ["drafter, sequences: program", "launches", *(f"{n}, ms" for n in FLOORS)]
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
                    *(f"{1e3 * launches * floor:.1f}" for floor in FLOORS.values()),
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
