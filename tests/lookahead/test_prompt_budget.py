"""How much of prompts joins a step: what decoding sequences and other prompts can bear."""

from __future__ import annotations

from dataclasses import replace

import pytest

from made_up_costs import costs
from tandem.lookahead.costs import CostModel
from tandem.lookahead.prompt_budget import NO_LIMITS, PromptBudget


def prefill(budget: PromptBudget, num_decoding: int, num_tokens: int) -> list[float]:
    """Seconds of each step in which a prompt is computed beside others; costs are as predicted."""
    truth = CostModel(costs("model"))
    alone = truth.verify(num_decoding, num_decoding + 1)
    seconds = []
    while num_tokens > 0:
        most = budget.limits(num_decoding, 1).most
        assert most is not None
        tokens = min(most, num_tokens)
        num_tokens -= tokens
        took = truth.verify(num_decoding, num_decoding + 1, tokens)
        budget.observe(num_decoding, took - alone)
        seconds.append(took)
    return seconds


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("num_decoding", [1, 8, 32])
def test_a_prompt_slows_decoding_as_far_as_is_allowed(slowdown: float, num_decoding: int) -> None:
    model = CostModel(costs("model"))
    budget = PromptBudget(model, slowdown)
    assert budget.limits(0, 1).most is None
    alone = model.verify(num_decoding, num_decoding)
    seconds = prefill(budget, num_decoding, 10**5)
    expected = (0.1 + 0.9 * slowdown) * alone
    assert seconds[-2] == pytest.approx(expected, rel=0.1)
    assert sum(seconds) / len(seconds) <= slowdown * alone


@pytest.mark.parametrize("factor", [1, 1000, 100_000])
def test_a_prompt_ends_whatever_its_tokens_cost(factor: int) -> None:
    """Where no step may have one for the slowdown's sake, one comes once enough was saved."""
    expensive = replace(costs("model"), prompt_token=factor * costs("model").prompt_token)
    model = CostModel(expensive)
    budget = PromptBudget(model, 2.0)
    chunks = []
    for _ in range(200):
        limits = budget.limits(8, 1)
        assert limits.most is not None
        assert limits.most <= limits.later
        chunks.append(limits.most)
        budget.observe(8, model.verify(8, 8, limits.most) - model.verify(8, 8))
    assert sum(chunks) >= 10
    if factor == 100_000:
        assert max(chunks) == 1


def test_a_step_later_may_have_more_by_what_was_saved() -> None:
    model = CostModel(costs("model"))
    budget = PromptBudget(model, 2.0)
    most = budget.limits(8, 1).most
    assert most == budget.limits(8, 1).later
    budget.observe(8, model.verify(8, 8, most) - model.verify(8, 8))
    after = budget.limits(8, 1)
    assert after.most is not None
    assert after.most < after.later == most


def test_a_short_prompt_is_not_cut() -> None:
    """A few steps' worth of time was left unused; a while later it is there again."""
    model = CostModel(costs("model"))
    budget = PromptBudget(model, 2.0)
    tokens = int(5 * model.verify(8, 8) / (model.verify(8, 8, 1) - model.verify(8, 8)))
    assert len(prefill(budget, 8, tokens)) == 1
    assert len(prefill(budget, 8, tokens)) > 1
    for _ in range(20):
        budget.limits(8, 0)
        budget.observe(8, 0.0)
    assert len(prefill(budget, 8, tokens)) == 1


def test_few_that_decode_do_not_hold_up_many_prompts() -> None:
    """As long as more decode than wait, prompts get the same; then in proportion."""
    budget = PromptBudget(CostModel(costs("model")), 2.0)
    tokens = [budget.limits(2, num_prompts).most for num_prompts in (1, 2, 4, 30)]
    assert tokens[0] is not None
    assert tokens[1] == tokens[0]
    assert tokens[2:] == pytest.approx([2 * tokens[0], 15 * tokens[0]], abs=15)


def test_prompts_that_cost_more_than_was_measured_get_fewer_tokens() -> None:
    model = CostModel(costs("model"))
    budget = PromptBudget(model, 2.0)
    alone, expected = model.verify(8, 8), budget.limits(8, 1)
    assert expected.most is not None
    assert expected.enough is not None
    true_cost = 3 * (model.verify(8, 8, 1) - alone)
    for _ in range(50):
        limits = budget.limits(8, 1)
        assert limits.most is not None
        model.observe_verify(8, 8, limits.most, alone + limits.most * true_cost)
    assert limits.most == pytest.approx(expected.most / 3, abs=1)
    assert limits.enough == pytest.approx(expected.enough / 3, abs=1)
    # What passes cost without prompts is another matter.
    assert model.verify(8, 8) == alone


@pytest.mark.parametrize("num_decoding", [0, 1, 30])
def test_prompts_wait_for_one_another_only_as_long_as_it_pays(num_decoding: int) -> None:
    """What any pass costs is a small part by then, however many more there are."""
    model = CostModel(costs("model"))
    budget = PromptBudget(model, 2.0)
    enough = budget.limits(num_decoding, 1).enough
    assert enough is not None
    assert budget.limits(num_decoding, 1000).enough == enough
    assert 4 <= model.verify(1, 1, enough) / model.verify(1, 1) <= 5


def test_there_are_no_limits_where_prompts_cost_nothing() -> None:
    free = replace(costs("model"), prompt_token=0.0)
    assert PromptBudget(CostModel(free), 2.0).limits(8, 1) == NO_LIMITS
