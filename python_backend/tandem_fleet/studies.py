"""What is asked of simulated fleets, each a table and a plot; see `simulate.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import simpy

from tandem_fleet.simulation import Fleet, Study

_RUN_SECONDS = 300.0


def _steady(rate: float) -> Callable[[float], float]:
    return lambda _: rate


def load(study: Study, pods: Sequence[int]) -> None:
    """Time to first token and price by load and number of pods."""
    shares = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    capacity = study.capacity()
    print(f"load: a pod serves {capacity:.3g} requests/s at most")
    print(
        f"{'pods':>6}{'load':>7}{'p50':>9}{'p95':>9}{'p99':>9}  seconds to first token{'price':>9}"
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for num in pods:
        rows = []
        # Enough requests for a 99th percentile with few pods, and not too many with a thousand.
        seconds = max(60.0, min(2000.0, 20_000 / capacity / num))
        for share in shares:
            rate = share * num * capacity
            fleet = Fleet(study, num, "least").run(_steady(rate), seconds)
            times = fleet.first_token_seconds()
            quantiles = [float(np.quantile(times, q)) for q in (0.5, 0.95, 0.99)]
            rows.append((share, *quantiles, fleet.price()))
            numbers = "".join(f"{value:9.2f}" for value in quantiles)
            print(f"{num:6d}{share:7.0%}{numbers}{fleet.price():9.2f}", flush=True)
        columns = list(zip(*rows, strict=True))
        label = f"{num} pod{'s' if num > 1 else ''}"
        left.plot(columns[0], columns[2], marker="o", label=label)
        right.plot(columns[0], columns[4], marker="o", label=label)
    left.set(xlabel="load, share of capacity", ylabel="time to first token, p95 (s)", yscale="log")
    right.set(xlabel="load, share of capacity", ylabel="price of a million tokens (pod-hours)")
    left.legend()
    _save(figure, study, "load")


def balancing(study: Study, pods: Sequence[int]) -> None:
    """The rules between pods, by load, with prefixes cached."""
    num = max(n for n in pods if n <= 16)
    capacity = study.capacity()
    print(f"balancing: {num} pods, conversations of {study.workload.turns} turns")
    print(f"{'rule':>12}{'load':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'cached':>9}")
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    shares = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2)
    for rule in ("random", "round-robin", "least", "prefix"):
        p95 = []
        for share in shares:
            rate = share * num * capacity
            fleet = Fleet(study, num, rule).run(_steady(rate), 4 * _RUN_SECONDS)
            times = fleet.first_token_seconds()
            quantiles = [float(np.quantile(times, q)) for q in (0.5, 0.95, 0.99)]
            cached = sum(r.num_cached for r in fleet.requests)
            hits = cached / sum(r.num_prompt for r in fleet.requests)
            numbers = "".join(f"{value:9.2f}" for value in quantiles)
            print(f"{rule:>12}{share:7.0%}{numbers}{hits:9.0%}", flush=True)
            p95.append(quantiles[1])
        axes.plot(shares, p95, marker="o", label=rule)
    axes.set(xlabel="load, share of capacity without a cache", yscale="log")
    axes.set(ylabel="time to first token, p95 (s)")
    axes.legend()
    _save(figure, study, "balancing")


def scaling(study: Study, _: Sequence[int]) -> None:
    """What the autoscaler follows, while the load rises to four times and falls, in two hours."""
    seconds, start = 7200.0, 2
    base = 0.6 * start * study.capacity()
    print(f"scaling: from {start} pods, load 1 to 4 and back within {seconds / 3600:.0f} h")
    print(f"{'signal':>12}{'p50':>9}{'p95':>9}{'p99':>9}{'pod-hours':>11}{'price':>9}")
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for signal in ("requests", "queue", "kv"):
        fleet = Fleet(study, start, "least")
        sizes: list[tuple[float, int]] = []
        fleet.scale(signal)
        fleet.env.process(_watch(fleet, sizes))
        fleet.run(lambda t: base * (1 + 3 * math.sin(math.pi * t / seconds) ** 2), seconds)
        times = fleet.first_token_seconds(skip=0)
        numbers = "".join(f"{float(np.quantile(times, q)):9.2f}" for q in (0.5, 0.95, 0.99))
        hours = fleet.pod_seconds / 3600
        print(f"{signal:>12}{numbers}{hours:11.1f}{fleet.price():9.2f}", flush=True)
        axes.plot([t / 60 for t, _ in sizes], [n for _, n in sizes], label=signal)
    axes.set(xlabel="minutes", ylabel="ready pods")
    axes.legend()
    _save(figure, study, "scaling")


def _watch(fleet: Fleet, sizes: list[tuple[float, int]]) -> Generator[simpy.Event, Any, None]:
    while True:
        sizes.append((fleet.env.now, len(fleet.pods)))
        yield fleet.env.timeout(30)


def speculation(study: Study, _: Sequence[int]) -> None:
    """Tokens a second of a pod by lookahead and batch; straight from the costs."""
    costs = study.costs
    lookaheads = range(costs.max_lookahead + 1)
    print("speculation: tokens/s of a pod, by sequences in the batch")
    print(f"{'batch':>7}" + "".join(f"{f'k = {k}':>9}" for k in lookaheads) + f"{'best':>7}")
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    batches = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= study.settings.max_num_seqs]
    table = {k: [n * costs.tokens(k) / costs.step(n, 0, k) for n in batches] for k in lookaheads}
    for row, num in enumerate(batches):
        numbers = "".join(f"{table[k][row]:9.1f}" for k in lookaheads)
        print(f"{num:7d}{numbers}{costs.best_lookahead(num):7d}")
    for k in lookaheads:
        axes.plot(batches, table[k], marker="o", label=f"k = {k}")
    axes.set(xlabel="sequences in the batch", ylabel="tokens/s", xscale="log")
    axes.set_xticks(batches, [str(n) for n in batches])
    axes.legend()
    _save(figure, study, "speculation")


def _save(figure: Any, study: Study, name: str) -> None:
    path = study.output / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"-> {path}\n", flush=True)
