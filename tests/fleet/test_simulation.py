"""The simulated fleet against queueing theory, by hand, and in what it is there to show."""

from __future__ import annotations

import json
import math
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy

from tandem_fleet import simulate
from tandem_fleet.costs import Costs
from tandem_fleet.pod import Pod, PodSettings, Request
from tandem_fleet.simulation import Arrival, Fleet, Study, Workload

VALUES: dict[str, Any] = {
    "verify": {"1": 0.02, "16": 0.03, "64": 0.07},
    "sequence": 0.0005,
    "prompt_token": 0.0002,
    "draft": {"mtp": {"begin": {"1": 0.001}, "guess": {"1": 0.002}}},
}
COSTS = Costs(VALUES, "mtp", [0.8, 0.5])
SETTINGS = PodSettings(16, 512, 32768, None)


def study(costs: Costs = COSTS, settings: PodSettings = SETTINGS, **workload: Any) -> Study:
    default = {"prompt_tokens": 200, "output_tokens": 100, "turns": 1, "think_seconds": 5.0}
    return Study(costs, settings, Workload(**{**default, **workload}), 1.0, Path())


def test_costs_lie_between_the_measured_points() -> None:
    assert COSTS.step(1, 0, 0) == pytest.approx(0.02)
    assert COSTS.step(16, 0, 0) == pytest.approx(0.03 + 15 * 0.0005)
    assert COSTS.step(4, 0, 0) == pytest.approx(0.022 + 3 * 0.0005)
    # Two drafts each: 12 rows, a round that begins, and two guesses.
    assert COSTS.step(4, 0, 2) == pytest.approx(0.02 + 0.01 * 11 / 15 + 0.0015 + 0.001 + 0.004)
    assert COSTS.step(1, 100, 0) == pytest.approx(0.04)
    assert [COSTS.tokens(k) for k in range(3)] == pytest.approx([1, 1.8, 2.2])


def test_one_request_takes_what_its_steps_take() -> None:
    env = simpy.Environment()
    pod = Pod(env, COSTS, PodSettings(16, 512, 32768, 0))
    request = Request(env, 1, 600, 0, 11)
    pod.send(request)
    env.run()
    # 512 tokens of the prompt, then 88, then ten steps.
    first = COSTS.step(1, 512, 0) + COSTS.step(1, 88, 0)
    assert request.first_token_at == pytest.approx(first)
    assert request.done_at == pytest.approx(first + 10 * COSTS.step(1, 0, 0))
    assert pod.num_requests == pod.kv_used == 0


def test_a_pod_with_one_place_waits_as_theory_says() -> None:
    """Pollaczek-Khinchine for constant service times: the mean wait is rho s / 2 (1 - rho)."""
    service, rho = COSTS.step(1, 1, 0), 0.7
    settings = PodSettings(1, 512, 32768, 0)
    rng = random.Random(0)
    times = accumulate(rng.expovariate(rho / service) for _ in range(40_000))
    arrivals = [Arrival(at, 1, 1) for at in times]
    fleet = Fleet(study(settings=settings), 1, "least").replay(arrivals)
    waits = fleet.first_token_seconds() - service
    assert float(np.mean(waits)) == pytest.approx(rho * service / 2 / (1 - rho), rel=0.1)


def test_an_overloaded_pod_serves_at_its_capacity() -> None:
    one = study()
    fleet = Fleet(one, 1, "least").run(lambda _: 3 * one.capacity(), 600)
    served = sum(1 for request in fleet.requests if not math.isnan(request.done_at))
    assert served / 600 == pytest.approx(one.capacity(), rel=0.1)


def test_the_least_loaded_pod_is_the_better_choice() -> None:
    one = study()
    times = {}
    for rule in ("random", "round-robin", "least"):
        fleet = Fleet(one, 8, rule).run(lambda _: 0.85 * 8 * one.capacity(), 600)
        times[rule] = float(np.quantile(fleet.first_token_seconds(), 0.95))
    assert times["least"] < times["round-robin"] < times["random"]


def test_affinity_finds_the_prefix_again() -> None:
    chats = study(turns=6)
    hits = {}
    for rule in ("least", "prefix"):
        fleet = Fleet(chats, 8, rule).run(lambda _: 4 * chats.capacity(), 600)
        num_prompt = sum(request.num_prompt for request in fleet.requests)
        hits[rule] = sum(request.num_cached for request in fleet.requests) / num_prompt
    assert hits["prefix"] > 2 * hits["least"] > 0


@pytest.mark.slow
def test_the_autoscaler_brings_pods_and_takes_them_away() -> None:
    one = study()
    rate = 5 * one.capacity()
    fleet = Fleet(one, 2, "least")
    fleet.scale("requests")
    fleet.run(lambda now: rate if now < 1800 else rate / 20, 7200)
    assert len(fleet.pods) == 2
    assert 6 < fleet.most_pods <= 16
    assert fleet.pod_seconds < 7200 * fleet.most_pods


def test_drafting_pays_until_the_batch_is_large() -> None:
    steep = Costs({**VALUES, "verify": {"1": 0.02, "16": 0.03, "64": 0.5}}, "mtp", [0.8, 0.5])
    assert steep.best_lookahead(1) == 2
    assert steep.best_lookahead(16) == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"verify": {"1": 0.1}}'])
def test_a_file_without_costs_is_refused(
    tmp_path: Path, content: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    monkeypatch.setattr("sys.argv", ["simulate_fleet.py", "load", "--costs", str(path)])
    assert simulate.main() == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.slow
def test_every_study_prints_a_table_and_draws_a_plot(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(VALUES))
    arguments = ["all", "--costs", str(path), "--output", str(tmp_path), "--pods", "1", "2"]
    quick = ["--prompt-tokens", "2000", "--output-tokens", "2000", "--acceptance", "0.6", "0.6"]
    monkeypatch.setattr("sys.argv", ["simulate_fleet.py", *arguments, *quick])
    assert simulate.main() == 0
    output = capsys.readouterr().out
    for name in simulate.STUDIES:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"{name}: " in output
