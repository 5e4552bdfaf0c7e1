"""With `batch_invariant`, the bits of a token's state depend on the tokens before it alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from doubles import HalfDrafter, plain, prompt_of, run
from tandem import Engine, SamplingParams, UnsupportedModelError
from tandem.models.verifier import VerifierOutput
from tandem.requests.sequence import ScheduledSequence, Sequence
from tiny_engines import DEVICE
from tiny_models import VERIFIERS

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="refused on a GPU")

MIXTURE = "gemma-4-26B-A4B"
SETTINGS: dict[str, Any] = {"batch_invariant": True, "max_num_seqs": 16, "block_size": 4}
REQUESTS = [
    (
        prompt_of(length),
        SamplingParams(max_tokens=24, temperature=temperature, seed=seed, ignore_eos=True),
    )
    for seed, (length, temperature) in enumerate(
        (length, temperature) for length in (1, 7, 30, 75) for temperature in (0.0, 1.0)
    )
]


def states(engine: Engine, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[Tensor]]:
    """The state behind each token of each answer, however they were computed."""
    found: dict[int, dict[int, Tensor]] = defaultdict(dict)
    forward = engine.verifier.forward

    def watch(batch: list[ScheduledSequence]) -> VerifierOutput:
        output = forward(batch)
        rows = iter(output.hidden)
        for scheduled in batch:
            for offset in range(scheduled.num_rows if scheduled.yields_token else 0):
                place = scheduled.sequence.num_tokens + offset
                # Rows behind rejected drafts are overwritten when the right token is known.
                found[scheduled.sequence.seed][place] = next(rows).clone()
        return output

    with monkeypatch.context() as patch:
        patch.setattr(engine.verifier, "forward", watch)
        sequences = [engine.make_sequence(*request, **options) for request in REQUESTS]
        run_all(engine, sequences, options.get("drafter") == "none")
    return [[found[s.seed][p] for p in range(s.num_prompt_tokens, s.num_tokens)] for s in sequences]


def run_all(engine: Engine, sequences: list[Sequence], alone: bool) -> None:
    for group in [[s] for s in sequences] if alone else [sequences]:
        run(engine, group)


@pytest.mark.parametrize(
    ("name", "enforce_eager"),
    [
        *((name, True) for name in VERIFIERS if name != MIXTURE),
        pytest.param("gemma-3", False, marks=pytest.mark.slow),
    ],
)
def test_states_have_the_same_bits(
    engines, monkeypatch: pytest.MonkeyPatch, name: str, enforce_eager: bool
) -> None:
    """Alone without drafts; in one batch with drafts, right and wrong; with other chunks."""
    settings = {**SETTINGS, "dtype": "bfloat16", "enforce_eager": enforce_eager}
    engine = engines(name, **settings)
    assert (engine.verifier.compiled is None) == enforce_eager
    expected = states(engine, monkeypatch, drafter="none")
    outputs = dict(enumerate(plain(engine, REQUESTS)))
    for max_num_batched_tokens in (256, 40):
        other = engines(name, **settings, max_num_batched_tokens=max_num_batched_tokens)
        monkeypatch.setitem(other.drafters, "ngram", HalfDrafter(outputs))
        for k in (1, 5):
            found = states(other, monkeypatch, drafter="ngram", num_speculative_tokens=k)
            for mine, right in zip(found, expected, strict=True):
                assert len(mine) == len(right)
                assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_products_outside_linear_layers_are_refused(engines) -> None:
    with pytest.raises(UnsupportedModelError, match="batch_invariant: Gemma4TextExperts has"):
        engines(MIXTURE, dtype="bfloat16", **SETTINGS)


def test_it_would_show_otherwise(engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, what a prompt's chunks are makes a difference."""
    settings = {**SETTINGS, "batch_invariant": False}
    results = [
        states(
            engines("gemma-3", dtype="bfloat16", **settings, max_num_batched_tokens=size),
            monkeypatch,
            drafter="none",
        )
        for size in (256, 16)
    ]
    pairs = [(a, b) for each in zip(*results, strict=True) for a, b in zip(*each, strict=True)]
    assert not all(torch.equal(a, b) for a, b in pairs)
