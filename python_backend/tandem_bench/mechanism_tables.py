"""What each mechanism brings, as tables; see `tandem_bench.mechanisms`."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items

from tandem_bench.figures import median, spread
from tandem_bench.mechanisms import ALL, EAGER, EAGER_NORMS, GROUPS
from tandem_bench.noise import NOISY
from tandem_bench.switches import MECHANISMS
from tandem_bench.tables import Cells, Rounds, by_round, table


def summary(cells: Cells) -> str:
    """What the engine does without each mechanism, as shares of what it does with it."""
    rounds = by_round(cells)
    return "\n".join(
        [
            "Tokens/s without it, as a share of those with it: the median of the rounds' ratios, "
            "and half of what lies between the highest and the lowest. Memory is how much more "
            "(MB of RSS) the process has without it:\n",
            _table(rounds, "tokens_per_second"),
            "The same for steps a second, which do not depend on how many drafts are accepted:\n",
            _table(rounds, "steps_per_second"),
            "Tokens/s of the whole engine:\n",
            _whole(rounds),
        ]
    )


def _table(rounds: Rounds, figure: str) -> str:
    columns = _columns(rounds)
    rows = []
    for group, names in GROUPS.items():
        for label, name, whole in _comparisons(names):
            found = [rounds.get((f"{group}: {way}", c), []) for way, c in columns]
            if any(name in cell["variants"] for cells in found for cell in cells):
                shown = [_ratio(cells, name, whole, figure) for cells in found]
                rows.append([label, *shown, _memory(found, name, whole)])
    return table(["without", *(f"{way}, {c}" for way, c in columns), "MB"], rows)


def _comparisons(names: Items[str]) -> Iterator[tuple[str, str, str]]:
    """What a row is called, the variant, and what that is compared with."""
    yield from ((name, name, ALL) for name in names if name in MECHANISMS)
    if EAGER in names:
        yield "both compiled ones", EAGER, ALL
        yield "fused norms, if nothing is compiled", EAGER_NORMS, EAGER
        yield "attention kernel, if nothing is compiled", "attention kernel", EAGER


def _columns(rounds: Rounds) -> list[tuple[str, int]]:
    """Drafter with way, and concurrency, in the order in which they were measured."""
    return list(dict.fromkeys((name.partition(": ")[2], c) for name, c in rounds))


def _ratio(cells: Items[Cells], name: str, whole: str, figure: str) -> str:
    """The median ratio, how far rounds lie apart, and a mark where others used the CPU."""
    ratios = [
        cell["variants"][name][figure] / cell["variants"][whole][figure]
        for cell in cells
        if name in cell["variants"]
    ]
    if not ratios:
        return ""
    noisy = "*" * (max(cell["foreign_cpu_share"] for cell in cells) > NOISY)
    apart = f" ±{50 * spread(ratios):.0f}%" if len(ratios) > 1 else ""
    return f"{median(ratios):.3f}{noisy}{apart}"


def _memory(found: Items[Items[Cells]], name: str, whole: str) -> str:
    """The difference of the most that both had."""
    cells = [cell["variants"] for cells in found for cell in cells if name in cell["variants"]]
    most = [max(cell[each]["rss_mb"] for cell in cells) for each in (name, whole)]
    return f"{most[0] - most[1]:+.0f}"


def _whole(rounds: Rounds) -> str:
    rows = []
    for group in GROUPS:
        shown = []
        for way, c in _columns(rounds):
            cells = rounds.get((f"{group}: {way}", c), [])
            speeds = [cell["variants"][ALL]["tokens_per_second"] for cell in cells]
            shown.append(f"{median(speeds):.1f}" if speeds else "")
        rows.append([f"group {group}", *shown])
    return table(["", *(f"{way}, {c}" for way, c in _columns(rounds))], rows)
