"""Results as pictures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure

from tandem_bench.figures import median
from tandem_bench.tables import Cells, by_round, names, speeds

Series = dict[str, list[tuple[float, float]]]


def draw(path: Path, panels: dict[tuple[str, str], Series], *, log: bool = True) -> None:
    """Lines in panels side by side; the keys of `panels` say what x and y are."""
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((x, y), series) in zip(axes, panels.items(), strict=True):
        for name, points in series.items():
            style = "-" if name.startswith("Tandem") or "Tandem" not in str(list(series)) else "--"
            axis.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
        if log:
            ticks = sorted({point[0] for points in series.values() for point in points})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        highest = max(point[1] for points in series.values() for point in points)
        axis.set_ylim(0, 1.08 * highest)
        axis.set_xlabel(x)
        axis.set_title(y)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def peers(cells: Cells, path: Path) -> None:
    """Throughput of all systems over concurrency."""
    rounds = by_round(cells)
    series: Series = defaultdict(list)
    for name in names(rounds):
        for (found, concurrency), several in rounds.items():
            if found == name:
                series[name].append((concurrency, median(speeds(several))))
    draw(path, {("concurrency", "tokens/s"): series})


def growth(cells: Cells, path: Path) -> None:
    """Step time over context and over concurrency."""
    panels: dict[tuple[str, str], Series] = defaultdict(lambda: defaultdict(list))
    for key, cell in cells.items():
        kind, size, drafter = key.split(" ", 2)
        panels[kind, "step, ms"][drafter].append((int(size), cell["step_ms"]))
    draw(path, panels)


def arrivals(cells: Cells, path: Path) -> None:
    """Latencies over the rate of arrival."""
    panels: dict[tuple[str, str], Series] = {}
    for kind, title in (("ttft_ms", "time to first token"), ("tpot_ms", "time per output token")):
        series: Series = defaultdict(list)
        for key, cell in cells.items():
            drafter = key.rsplit(" at ", 1)[0]
            for percent in ("p50", "p95"):
                series[f"{drafter}, {percent}"].append((cell["rate"], cell[kind][percent]))
        panels["requests/s", f"{title}, ms"] = series
    draw(path, panels)


def soak(cells: Cells, path: Path) -> None:
    """Memory over time."""
    points = [(seconds / 60, mb) for seconds, mb in cells["samples"]]
    draw(path, {("minutes", "RSS, MB"): {"engine": points}}, log=False)


def profile(cells: Cells, path: Path) -> None:
    """Where a step's time goes, as one bar for each drafter and concurrency."""
    figure = matplotlib.figure.Figure(figsize=(9, 0.7 * len(cells) + 1.8), layout="constrained")
    axis = figure.subplots()
    shares = {name: kinds(cell) for name, cell in cells.items()}
    order = sorted({kind for share in shares.values() for kind in share})
    colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    left = dict.fromkeys(shares, 0.0)
    for number, kind in enumerate(order):
        widths = [share.get(kind, 0.0) for share in shares.values()]
        axis.barh(list(shares), widths, left=list(left.values()), label=kind, color=colors[number])
        left = {name: left[name] + share.get(kind, 0.0) for name, share in shares.items()}
    axis.invert_yaxis()
    axis.set_xlabel("ms of a step")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def kinds(cell: Cells) -> dict[str, float]:
    """Milliseconds of a step in a few kinds of work; the drafter's are one kind."""
    merged: dict[str, float] = defaultdict(float)
    for group, ms in cell["groups"].items():
        phase, kind = group.split(": ", 1)
        small = re.sub(r"residuals and inputs|rotary embedding|token embedding", "other", kind)
        merged["drafter" if phase == "draft" else small] += ms
    merged["no operator running"] = cell["python_ms"]
    return dict(merged)


def lookahead(cells: Cells, path: Path) -> None:
    """Speed against plain decoding over concurrency: each fixed lookahead, and the adaptive one."""
    panels: dict[tuple[str, str], Series] = defaultdict(lambda: defaultdict(list))
    for key, cell in cells.items():
        kind, concurrency = key.rsplit(" c", 1)
        for name, figures in cell.items():
            label = f"Tandem, {name}" if name == "adaptive" else f"k={name}"
            factor = figures["tokens_per_second"] / cell["0"]["tokens_per_second"]
            panels["concurrency", f"{kind}: times plain"][label].append((int(concurrency), factor))
    draw(path, panels)


PLOTS: dict[str, Callable[[Any, Path], None]] = {
    "peers": peers,
    "growth": growth,
    "lookahead": lookahead,
    "arrivals": arrivals,
    "soak": soak,
    "profile": profile,
}
