"""With `batch_invariant`, the bits of a token's state depend on the tokens before it alone."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from doubles import HalfDrafter, finish, plain, prompt_of, run
from tandem import Engine, Guide, SamplingParams, UnsupportedModelError
from tandem.cpu import linear
from tandem.cpu.linear import PackedLinear
from tandem.models.verifier import VerifierOutput
from tandem.requests.sequence import ScheduledSequence, Sequence
from tiny_engines import DEVICE, Engines
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
# Of these a grammar leaves but one.
GUIDED = [
    (prompt, replace(params, guide=Guide("regex", "the sum of [0-9]{2} and [0-9]{2}")))
    for prompt, params in REQUESTS
]
SMALL = {"max_model_len": 100, "kv_cache_tokens": 200}
CACHING = {"enable_prefix_caching": True}
Request = tuple[list[int], SamplingParams]
# How the engine comes by sequences that are to be answered.
Way = Callable[[Engine, Items[Sequence]], None]


def states(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    way: Way = run,
    requests: Items[Request] = REQUESTS,
    **options: Any,
) -> list[list[Tensor]]:
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
        sequences = [engine.make_sequence(*request, **options) for request in requests]
        way(engine, sequences)
    return [[found[s.seed][p] for p in range(s.num_prompt_tokens, s.num_tokens)] for s in sequences]


def alone(engine: Engine, sequences: Items[Sequence]) -> None:
    for sequence in sequences:
        run(engine, [sequence])


def later_first(engine: Engine, sequences: Items[Sequence]) -> None:
    """Each comes when the one before it has begun."""
    for sequence in reversed(sequences):
        engine.add(sequence)
        engine.step()
    finish(engine)


def preempted(engine: Engine, sequences: Items[Sequence]) -> None:
    before = engine.load.num_preemptions
    run(engine, sequences)
    assert engine.load.num_preemptions > before


def behind_prefix_hits(engine: Engine, sequences: Items[Sequence]) -> None:
    for number, sequence in enumerate(sequences):
        prefix = sequence.token_ids[: -1 - number % 5] or sequence.token_ids
        run(engine, [engine.make_sequence(prefix, SamplingParams(max_tokens=1))])
    before = engine.stats.num_prefix_cache_hits
    run(engine, sequences)
    assert engine.stats.num_prefix_cache_hits > before


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
    expected = states(engine, monkeypatch, alone, drafter="none")
    outputs = dict(enumerate(plain(engine, REQUESTS)))
    for max_num_batched_tokens in (256, 40):
        other = engines(name, **settings, max_num_batched_tokens=max_num_batched_tokens)
        monkeypatch.setitem(other.drafters, "ngram", HalfDrafter(outputs))
        for k in (1, 5):
            found = states(other, monkeypatch, drafter="ngram", num_speculative_tokens=k)
            for mine, right in zip(found, expected, strict=True):
                assert len(mine) == len(right)
                assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_products_outside_packed_layers_are_refused(engines) -> None:
    with pytest.raises(UnsupportedModelError, match="batch_invariant: Gemma4TextExperts has"):
        engines(MIXTURE, dtype="bfloat16", **SETTINGS)


def test_a_type_that_the_processor_does_not_multiply_is_named(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.cpu.wing.can_pack", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match="no products of packed weights in float16"):
        engines.make("gemma-3", dtype="float16", **SETTINGS)


def test_the_default_leaves_out_what_cannot_be_had(
    engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engines.make(MIXTURE)
    assert "batch_invariant is off: Gemma4TextExperts has weights outside linear" in caplog.text
    caplog.clear()
    engines.make("gemma-3", enforce_eager=True)
    assert re.search(r"batch_invariant is (on|off): products of 1, 4, 16 rows", caplog.text)


@pytest.mark.parametrize(
    ("costs", "is_on"), [([0.02], True), ([0.4, 0.02], True), ([0.04] * 2, False)]
)
def test_the_default_pays_next_to_nothing(
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    costs: list[float],
    is_on: bool,
) -> None:
    """What else the machine does while a product is timed isn't taken for its cost.

    Nor does a later load, on a machine that is busy then, decide otherwise.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = [*costs, 0.5, 0.5]
    rounds = []

    def cost_of(_: object, count: int) -> dict[int, float]:
        rounds.append(count)
        return {1: -0.2, 4: times.pop(0), 16: 0.0}

    monkeypatch.setattr("tandem.cpu.wing.cost_of_own_products", cost_of)
    caplog.set_level(logging.INFO)
    for said in (costs[-1], costs[-1] if is_on else 0.5):
        caplog.clear()
        engine = engines.make("gemma-3", enforce_eager=True)
        layers = [m for m in engine.verifier.model.modules() if isinstance(m, PackedLinear)]
        assert {layer.memory is not None for layer in layers} == {is_on}
        assert f"-20%, +{said:.0%}, +0%" in caplog.text
    assert rounds == [3, 30][: len(costs)] + ([] if is_on else [3, 30])


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize(
    ("way", "requests", "drafter", "settings"),
    [
        pytest.param(run, REQUESTS, "none", {}, id="together", marks=pytest.mark.slow),
        pytest.param(alone, REQUESTS, "none", {"max_num_batched_tokens": 16}, id="chunks"),
        pytest.param(
            later_first, REQUESTS, "none", {}, id="order of arrival", marks=pytest.mark.slow
        ),
        pytest.param(preempted, REQUESTS, "none", SMALL, id="preemption", marks=pytest.mark.slow),
        pytest.param(
            behind_prefix_hits, REQUESTS, "none", CACHING, id="prefix hits", marks=pytest.mark.slow
        ),
        pytest.param(alone, GUIDED, "ngram", {}, id="forced tokens", marks=pytest.mark.slow),
    ],
)
def test_a_library_whose_products_depend_on_their_rows(
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    requests: Items[Request],
    drafter: str,
    settings: dict[str, Any],
    batch_invariant: bool,
) -> None:
    """They make a difference, whatever the way to an answer, unless they aren't used."""
    product = linear._linear

    def depends(rows: Tensor, *arguments: Any) -> Tensor:
        result: Tensor = product(rows, *arguments)
        return result + 1e-3 * (rows.shape[:-1].numel() % 3)

    monkeypatch.setattr(linear, "_linear", depends)
    common = {**SETTINGS, "dtype": "bfloat16", "batch_invariant": batch_invariant}
    with monkeypatch.context() as patch:
        patch.setattr("tandem.engine.force", lambda _: None)
        engine = engines("gemma-3", **common)
        expected = states(engine, monkeypatch, alone, requests, drafter="none")
    other = engines("gemma-3", **common, **settings)
    found = states(other, monkeypatch, way, requests, drafter=drafter)
    pairs = [
        (a, b)
        for each in zip(found, expected, strict=True)
        for a, b in zip(*each, strict=batch_invariant)
    ]
    assert all(torch.equal(a, b) for a, b in pairs) == batch_invariant
