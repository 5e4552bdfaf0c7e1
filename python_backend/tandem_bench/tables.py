"""Results as Markdown tables. Medians of the rounds; a ratio is one of two medians.

Except where both took turns within each round: there it is the median of the rounds' ratios.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import Any

from tandem_bench.figures import median, ratio, spread
from tandem_bench.noise import NOISY

Cells = dict[str, Any]
Rounds = dict[tuple[str, int], list[Cells]]  # by name and concurrency


def table(header: Items[str], rows: Iterable[Items[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def by_round(cells: Cells) -> Rounds:
    """Cells whose names end in ` c<concurrency> r<round>`, together with their other rounds."""
    rounds: Rounds = defaultdict(list)
    for key, cell in cells.items():
        if match := re.fullmatch(r"(.+) c(\d+) r\d+", key):
            rounds[match[1], int(match[2])].append(cell)
    return dict(rounds)


def names(rounds: Rounds) -> list[str]:
    """What was measured, in the order in which it first was, alphabetically within a kind."""
    return sorted({name for name, _ in rounds})


def concurrencies(rounds: Rounds) -> list[int]:
    """The concurrencies that occur."""
    return sorted({concurrency for _, concurrency in rounds})


def speeds(cells: Items[Cells]) -> list[float]:
    """Tokens/s of each round."""
    return [cell["tokens_per_second"] for cell in cells]


def value(cells: Items[Cells], *path: str) -> float:
    """The median over rounds of a figure that lies at `path` in each cell."""
    found = []
    for cell in cells:
        inner: Any = cell
        for name in path:
            inner = inner[name]
        found.append(inner)
    return median(found)


def grid(rounds: Rounds, show: Callable[[list[Cells]], str]) -> str:
    """A row for each name and a column for each concurrency."""
    columns = concurrencies(rounds)
    return table(
        ["concurrency", *columns_of(columns)],
        [
            [name, *(show(rounds[name, c]) if (name, c) in rounds else "" for c in columns)]
            for name in names(rounds)
        ],
    )


def columns_of(numbers: Items[int]) -> list[str]:
    """Numbers as the heads of columns."""
    return [str(number) for number in numbers]


def speed(cells: Items[Cells]) -> str:
    """Tokens/s, how far the rounds lie apart, and a mark where others used the CPU."""
    rates = speeds(cells)
    noisy = "*" * (max(cell.get("foreign_cpu_share", 0) for cell in cells) > NOISY)
    apart = f" (±{50 * spread(rates):.0f}%)" if len(rates) > 1 else ""
    return f"{median(rates):.1f}{noisy}{apart}"


def ratios(rounds: Rounds, ours: str, theirs: str) -> str:
    """A row for each of ours against each of theirs, by concurrency."""
    columns = concurrencies(rounds)
    rows = []
    for name in (n for n in names(rounds) if n.startswith(ours)):
        for other in (n for n in names(rounds) if re.match(theirs, n)):
            both = [c for c in columns if {(name, c), (other, c)} <= rounds.keys()]
            pairs = {c: ratio(speeds(rounds[name, c]), speeds(rounds[other, c])) for c in both}
            shown = [f"{pairs[c]:.2f}" if c in pairs else "" for c in columns]
            rows.append([f"{name} / {other}", *shown])
    return table(["concurrency", *columns_of(columns)], rows)


def peers(cells: Cells) -> str:
    """Throughput of all systems, Tandem's ratios to its peers, latencies, and agreement."""
    rounds = by_round(cells)

    def latency(kind: str) -> str:
        return grid(rounds, lambda found: f"{value(found, kind, 'p50'):.1f}")

    def equal(found: list[Cells]) -> str:
        agreed = found[0]["against_reference"]
        where = agreed["first_divergence_median"]
        parted = "" if where is None else f", others part at {where:.0f}"
        return f"{agreed['num_equal']} of {agreed['num_answers']}{parted}"

    waiting = max(c["others_cpu_share"] for found in rounds.values() for c in found)
    return "\n".join(
        [
            "Tokens/s:\n",
            grid(rounds, speed),
            "Ratios of medians:\n",
            ratios(rounds, "Tandem", r"HF|vLLM"),
            "Time to first token, ms, median:\n",
            latency("ttft_ms"),
            "Time per output token, ms, median:\n",
            latency("tpot_ms"),
            "Answers equal to those of HF generate at batch 1, and at which token the others part "
            "(median):\n",
            grid(rounds, equal),
            f"Processes that waited used at most {waiting:.1%} of a core.\n",
        ]
    )


def engine(cells: Cells) -> str:
    """Throughput, latencies, acceptance and phases of the engine alone."""
    rounds = by_round(cells)
    phases = ["schedule", "draft", "verify", "accept", "commit"]
    rows = [
        [
            f"{name}, {c}",
            f"{value(found, 'step_ms'):.1f}",
            *(f"{value(found, 'phases_ms', phase):.2f}" for phase in phases),
            f"{value(found, 'mean_acceptance_length'):.2f}",
            f"{value(found, 'num_tokens') / value(found, 'num_steps') / c:.2f}",
        ]
        for (name, c), found in sorted(rounds.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    return "\n".join(
        [
            "Tokens/s:\n",
            grid(rounds, speed),
            "Against plain decoding:\n",
            ratios(rounds, "", "none$"),
            "Time to first token, ms, median:\n",
            grid(rounds, lambda found: f"{value(found, 'ttft_ms', 'p50'):.1f}"),
            "Time per output token, ms, median:\n",
            grid(rounds, lambda found: f"{value(found, 'tpot_ms', 'p50'):.1f}"),
            "Milliseconds of a step by phase; tokens of a round with drafts; tokens a step and "
            "sequence:\n",
            table(["drafter, concurrency", "step", *phases, "mean length", "tokens a step"], rows),
        ]
    )


def triton(cells: Cells) -> str:
    """What Triton and gRPC cost: medians of the rounds' ratios, as both took turns in each."""
    rounds = by_round(cells)
    alone, through = "engine alone ", "through Triton "
    rows = []
    for (name, c), found in sorted(rounds.items(), key=lambda item: item[0][1]):
        if not name.startswith(through):
            continue
        engine_cells = rounds[alone + name.removeprefix(through), c]
        pairs = list(zip(found, engine_cells, strict=True))
        shares = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
        waits = [a["ttft_ms"]["p50"] - b["ttft_ms"]["p50"] for a, b in pairs]
        rows.append(
            [
                f"{name.removeprefix(through)}, {c}",
                speed(engine_cells),
                speed(found),
                f"{median(shares):.3f}",
                ", ".join(f"{share:.3f}" for share in shares),
                f"{median(waits):+.1f}",
            ]
        )
    header = ["drafter, concurrency", "engine, tokens/s", "Triton, tokens/s", "ratio"]
    return table([*header, "in each round", "time to first token, ms more"], rows)


def profile(cells: Cells) -> str:
    """Where the time of a step goes."""
    rows = [
        [
            name,
            f"{cell['step_ms']:.1f}",
            f"{cell['products_ms']:.1f}",
            f"{cell['python_ms']:.1f}",
            f"{cell['share_outside_products']:.1%}",
            ", ".join(f"{share:.1%}" for share in cell["shares"]),
        ]
        for name, cell in cells.items()
    ]
    header = ["drafter, concurrency", "step, ms", "products", "no operator running"]
    parts = [table([*header, "outside products", "in each round"], rows)]
    for name, cell in cells.items():
        groups = [[group, f"{ms:.2f}"] for group, ms in cell["groups"].items() if ms >= 0.05]
        parts.append(f"Operators by phase and kind, {name}:\n")
        parts.append(table(["phase: kind", "ms a step"], groups))
        operators = [[o["operator"], o["self_ms"], o["calls"]] for o in cell["top_operators"]]
        parts.append(table(["operator", "its own ms a step", "calls"], operators))
    return "\n".join(parts)


def each_figure(cells: Cells) -> str:
    """One figure a row."""
    rows: list[list[Any]] = [
        [name, figure.replace("_", " "), value]
        for name, cell in cells.items()
        for figure, value in cell.items()
    ]
    return table(["", "", ""], rows)


def growth(cells: Cells) -> str:
    """Step time and memory by context and concurrency."""
    rows = [
        [
            name,
            f"{cell['step_ms']:.1f}",
            f"{cell['prefill_tokens_per_second']:.0f}",
            cell["kv_cache_blocks_used"],
            cell["rss_mb"],
        ]
        for name, cell in cells.items()
    ]
    return table(["", "step, ms", "prefill, tokens/s", "KV blocks", "RSS, MB"], rows)


def arrivals(cells: Cells) -> str:
    """Latencies under a Poisson process."""
    percentiles = ("p50", "p95", "p99")
    rows = [
        [
            name,
            f"{cell['tokens_per_second']:.0f}",
            *(f"{cell[kind][p]:.0f}" for kind in ("ttft_ms", "tpot_ms") for p in percentiles),
        ]
        for name, cell in cells.items()
    ]
    heads = [f"{kind} {p}, ms" for kind in ("TTFT", "TPOT") for p in percentiles]
    return table(["drafter and rate", "tokens/s", *heads], rows)


def facts(cells: Cells) -> str:
    """Cells that are a few named figures each."""
    figures = {k: v for cell in cells.values() if isinstance(cell, dict) for k, v in cell.items()}
    return table(["", ""], figures.items())
