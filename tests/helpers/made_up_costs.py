"""Costs of a machine that never was, for tests that must not depend on this one's."""

from __future__ import annotations

from tandem.lookahead.costs import Costs, DraftCosts
from tandem.lookahead.curve import Curve

# Drafts cost nothing at all.
FLAT = Curve({1: 20e-3})
# As of a model whose pass is bound by memory up to some 16 tokens and by arithmetic behind.
VERIFY = Curve({1: 20e-3, 8: 23e-3, 16: 29e-3, 32: 39e-3, 64: 69e-3, 128: 125e-3, 256: 250e-3})


def costs(*drafters: str, verify: Curve = VERIFY) -> Costs:
    """Costs with which n-grams are free and any model takes a while."""
    free = DraftCosts(Curve({1: 3e-5, 32: 3e-4}), Curve({1: 0.0}))
    model = DraftCosts(Curve({1: 5e-4, 32: 1.4e-3}), Curve({1: 1.3e-3, 4: 1.8e-3, 32: 4.5e-3}))
    draft = {name: free if name == "ngram" else model for name in drafters}
    return Costs(verify, sequence=2e-4, prompt_token=3e-4, draft=draft)
