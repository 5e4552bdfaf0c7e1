"""Measured costs that are wrong: a minute of service makes them harmless."""

from __future__ import annotations

from functools import cache

import pytest

from made_up_costs import VERIFY, costs
from made_up_service import Service
from tandem.calibration import doubtful
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.corrected_curve import CorrectedCurve
from tandem.lookahead.costs import CostModel, Costs, DraftCosts
from tandem.lookahead.curve import Curve

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MINUTE = 60.0


def rate(made_up: Costs) -> float:
    """Tokens a second behind the first minute."""
    service = Service(AdaptiveLookahead(CostModel(made_up)), 8, 0.8)
    service.rate(MINUTE)
    return service.rate(MINUTE)


@cache
def best_rate() -> float:
    """With costs that are right."""
    return rate(costs("model"))


@pytest.mark.parametrize("factor", [4.0, 0.25])
@pytest.mark.parametrize(
    "rows",
    [(1,), (2, 3), (8, 12), (16, 24, 32, 48), ROWS[1:]],
    ids=lambda rows: f"{rows[0]}-{rows[-1]}",
)
def test_passes_that_are_wrong_by_four_are_harmless(rows: tuple[int, ...], factor: float) -> None:
    good = costs("model")
    wrong = Curve({n: VERIFY(n) * (factor if n in rows else 1) for n in ROWS})
    assert rate(Costs(wrong, good.sequence, good.prompt_token, good.draft)) > 0.95 * best_rate()


@pytest.mark.parametrize("factor", [4.0, 0.25])
@pytest.mark.parametrize("part", ["begin", "guess"])
def test_drafting_that_is_wrong_by_four_is_harmless(part: str, factor: float) -> None:
    good = costs("model")
    curves = good.draft["model"]._asdict()
    curves[part] = Curve({n: factor * seconds for n, seconds in curves[part].points.items()})
    draft = {"model": DraftCosts(**curves)}
    assert rate(Costs(good.verify, good.sequence, good.prompt_token, draft)) > 0.95 * best_rate()


def test_a_figure_among_others_that_contradict_it_is_left_out() -> None:
    points = {1: 1.0, 2: 1.1, 4: 5.0, 8: 1.3, 16: 1.4}
    assert Curve(points).points == {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.3, 16: 1.4}
    assert Curve(points | {4: 1.2, 8: 0.3}).points == {1: 1.0, 2: 1.1, 4: 1.1, 8: 1.1, 16: 1.4}


def test_what_was_disturbed_is_found() -> None:
    sound = {n: VERIFY(n) for n in ROWS}
    assert doubtful(sound) == []
    for disturbed in ((4,), (192,), (256,), (1, 2), (96, 128)):
        found = {n: seconds * (4 if n in disturbed else 1) for n, seconds in sound.items()}
        assert doubtful(found) == list(disturbed)


def test_a_point_that_is_not_seen_any_more_is_tried_again() -> None:
    """What made it dear may be over."""
    curve = CorrectedCurve(Curve({1: 1.0, 8: 1.0}))
    for _ in range(100):
        curve.observe(8, 2.0 / curve(8))
    assert curve(8) == pytest.approx(2.0, rel=0.01)
    for _ in range(1000):
        curve.observe(1, 1.0 / curve(1))
    assert curve(8) == pytest.approx(1.0, rel=0.01)
    curve.observe(8, 2.0)
    assert curve(8) > 1.5


def test_what_disagrees_for_long_is_reported_once() -> None:
    told: list[float] = []
    model = CostModel(costs("model"), told.append)
    for _ in range(3000):
        model.observe_verify(1, 1, 0, 20e-3)
    assert told == []
    for _ in range(3000):
        model.observe_verify(1, 1, 0, 20e-3)
        model.observe_verify(128, 1, 0, 4 * 125e-3)
    assert told == [pytest.approx(4.0, rel=0.05)]
