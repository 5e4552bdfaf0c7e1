"""Speculation that can't be seen: drafters, batches and evictions change no token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from block_tables import blocks_of, num_blocks_of
from doubles import HalfDrafter, OracleDrafter, WrongDrafter, finish, plain, prompt_of, run
from made_up_costs import FLAT, VERIFY, costs
from tandem import Engine, FinishReason, SamplingParams
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.costs import CostModel
from tiny_engines import MAX_LOOKAHEAD
from tiny_models import ASSISTANTS

pytestmark = pytest.mark.both_wings
NUM_TOKENS = 24
FILTERS = [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}]
PARAMS = [
    SamplingParams(
        max_tokens=NUM_TOKENS, temperature=temperature, seed=seed, ignore_eos=True, **filters
    )
    for seed, (temperature, filters) in enumerate(
        (temperature, filters) for temperature in (0, 0.7, 1.3) for filters in FILTERS
    )
]
REQUESTS = [(prompt_of(3 + 2 * params.seed), params) for params in PARAMS]
DOUBLES = {"oracle": OracleDrafter, "wrong": WrongDrafter, "half": HalfDrafter}
LOOKAHEADS = range(1, MAX_LOOKAHEAD + 1)
WIDE = {"max_num_seqs": 96, "max_num_batched_tokens": 1024}


def outputs_by_seed(engine: Engine) -> dict[int, list[int]]:
    return {
        params.seed: output
        for (_, params), output in zip(REQUESTS, plain(engine, REQUESTS), strict=True)
    }


def use(monkeypatch: pytest.MonkeyPatch, engine: Engine, drafter: str) -> str:
    """The name under which the engine knows the drafter; a double takes ngram's place."""
    if drafter not in DOUBLES:
        return drafter
    monkeypatch.setitem(engine.drafters, "ngram", DOUBLES[drafter](outputs_by_seed(engine)))
    return "ngram"


@pytest.mark.parametrize(
    "drafter",
    [
        "ngram",
        "oracle",
        "wrong",
        "half",
        "mtp",
        "causal_lm",
        "ngram+mtp",
        "ngram+causal_lm",
    ],
)
def test_tokens_equal_plain_decoding_for_every_lookahead(
    engines, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """All temperatures, filters and lookaheads 1 to 8 in one batch."""
    verifier = "gemma-4-E2B" if "mtp" in drafter else "llama"
    causal_lm = "qwen-3" if "causal_lm" in drafter else None
    engine = engines(verifier, mtp="mtp" in drafter, causal_lm=causal_lm, **WIDE)
    expected = outputs_by_seed(engine)
    name = use(monkeypatch, engine, drafter)
    sequences = [
        engine.make_sequence(prompt, params, drafter=name, num_speculative_tokens=lookahead)
        for prompt, params in REQUESTS
        for lookahead in LOOKAHEADS
    ]
    run(engine, sequences)
    for sequence in sequences:
        assert sequence.output_ids == expected[sequence.seed], sequence.max_lookahead
    accepted = sum(sequence.num_accepted_tokens for sequence in sequences)
    drafted = sum(sequence.num_draft_tokens for sequence in sequences)
    assert drafted > 0
    if drafter == "oracle":
        assert accepted == drafted
        for sequence in sequences:
            rounds = -(-(NUM_TOKENS - 1) // (sequence.max_lookahead + 1))
            assert sequence.num_verify_steps == 1 + rounds
    elif drafter == "wrong":
        assert accepted == 0
        assert all(sequence.num_verify_steps == NUM_TOKENS for sequence in sequences)
    elif drafter == "half":
        assert 0 < accepted < drafted


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter", ["ngram", "oracle", "half", "mtp", "causal_lm", "ngram+mtp", "ngram+causal_lm"]
)
def test_tokens_equal_plain_decoding_with_an_adaptive_lookahead(
    engines, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """At costs under which hardly a draft pays, and under which the worst does."""
    verifier = "gemma-4-E2B" if "mtp" in drafter else "llama"
    causal_lm = "qwen-3" if "causal_lm" in drafter else None
    engine = engines(verifier, mtp="mtp" in drafter, causal_lm=causal_lm, **WIDE)
    expected = outputs_by_seed(engine)
    name = use(monkeypatch, engine, drafter)
    lengths = set()
    batches = [*([request] for request in REQUESTS), REQUESTS, REQUESTS * 4]
    for verify in (VERIFY, FLAT):
        lookahead = AdaptiveLookahead(CostModel(costs(*engine.drafters, verify=verify)))
        monkeypatch.setattr(engine, "lookahead", lookahead)
        for batch in batches:
            sequences = [engine.make_sequence(*request, drafter=name) for request in batch]
            for sequence in sequences:
                engine.add(sequence)
            while engine.has_work:
                lengths |= {delta.num_draft_tokens for delta in engine.step()}
            for sequence in sequences:
                assert sequence.output_ids == expected[sequence.seed]
        assert not lookahead.num_known
    assert len(lengths) > 1


@pytest.mark.parametrize("verifier", [name for name in ASSISTANTS if name != "gemma-4-E2B"])
def test_tokens_equal_plain_decoding_with_each_assistant(engines, verifier: str) -> None:
    """Every kind of MTP pair, lookaheads from 1 to 8 mixed in one batch."""
    engine = engines(verifier, mtp=True, max_num_seqs=16)
    expected = plain(engine, REQUESTS)
    sequences = [
        engine.make_sequence(
            prompt, params, drafter="mtp", num_speculative_tokens=1 + params.seed % MAX_LOOKAHEAD
        )
        for prompt, params in REQUESTS
    ]
    run(engine, sequences)
    assert [sequence.output_ids for sequence in sequences] == expected
    assert all(sequence.num_draft_tokens > 0 for sequence in sequences)


def test_drafters_share_a_batch(engines) -> None:
    """Plain, n-gram, MTP and causal LM sequences side by side."""
    engine = engines("gemma-4-E2B", mtp=True, causal_lm="llama", **WIDE)
    expected = outputs_by_seed(engine)
    sequences = [
        engine.make_sequence(prompt, params, drafter=drafter)
        for prompt, params in REQUESTS
        for drafter in ("none", "ngram", "mtp", "causal_lm")
    ]
    run(engine, sequences)
    for sequence in sequences:
        assert sequence.output_ids == expected[sequence.seed], sequence.drafter


@pytest.mark.parametrize("verifier", ["llama", "gemma-3", "gemma-4-26B-A4B"])
def test_tokens_alone_equal_tokens_among_32_others(engines, verifier: str) -> None:
    """A sequence's neighbours in the packed row never reach it (float32)."""
    engine = engines(verifier, max_num_seqs=40, max_num_batched_tokens=512)
    alone = [plain(engine, [request])[0] for request in REQUESTS[::3]]
    others = [
        (prompt_of(5 + i, seed=1), replace(PARAMS[i % len(PARAMS)], seed=100 + i))
        for i in range(32)
    ]
    for request, expected in zip(REQUESTS[::3], alone, strict=True):
        crowd = [*others[:16], request, *others[16:]]
        sequences = [
            engine.make_sequence(prompt, params, drafter=("none", "ngram")[i % 2])
            for i, (prompt, params) in enumerate(crowd)
        ]
        run(engine, sequences)
        assert sequences[16].output_ids == expected


@pytest.mark.parametrize("drafter", ["none", "ngram", "oracle", "half", "mtp", "causal_lm"])
def test_preemption_changes_no_token(
    engines, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """A pool that holds two of twelve sequences at full length."""
    mtp = drafter == "mtp"
    verifier = "gemma-4-31B" if mtp else "llama"
    causal_lm = "qwen-3" if drafter == "causal_lm" else None
    roomy = engines(verifier, mtp=mtp)
    tight = engines(verifier, mtp=mtp, causal_lm=causal_lm, max_model_len=60, kv_cache_tokens=100)
    expected = outputs_by_seed(roomy)
    if drafter in DOUBLES:
        monkeypatch.setitem(tight.drafters, "ngram", DOUBLES[drafter](expected))
    before = tight.load.num_preemptions
    sequences = [
        tight.make_sequence(prompt, params, drafter="ngram" if drafter in DOUBLES else drafter)
        for prompt, params in REQUESTS
    ]
    run(tight, sequences)
    assert tight.load.num_preemptions > before
    for sequence in sequences:
        assert sequence.output_ids == expected[sequence.seed]


def test_an_end_of_sequence_among_accepted_drafts_ends_the_text(
    engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts behind it match too, but are neither output nor counted."""
    engine = engines("llama", **WIDE)
    expected = outputs_by_seed(engine)
    monkeypatch.setitem(engine.drafters, "ngram", OracleDrafter(expected))
    prompt, params = REQUESTS[-1]
    output = expected[params.seed]
    end = next(i for i, token in enumerate(output) if i % 9 == 4 and token not in output[:i])
    monkeypatch.setattr(engine, "eos_token_ids", frozenset([output[end]]))
    sequence = engine.make_sequence(prompt, replace(params, ignore_eos=False), drafter="ngram")
    run(engine, [sequence])
    assert sequence.output_ids == output[: end + 1]
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.num_accepted_tokens < sequence.num_draft_tokens


@pytest.mark.parametrize("drafter", ["wrong", "half"])
def test_blocks_of_rejected_drafts_are_given_back(
    engines, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """After a step a sequence holds what its known tokens fill, and no block more."""
    engine = engines("llama")
    name = use(monkeypatch, engine, drafter)
    sequences = [engine.make_sequence(prompt, params, drafter=name) for prompt, params in REQUESTS]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            filled = -(-sequence.num_tokens // engine.config.block_size)
            assert len(blocks_of(sequence)) == filled


@pytest.mark.parametrize("drafter", ["ngram", "mtp", "causal_lm", "ngram+causal_lm"])
def test_arrivals_change_no_token(engines, drafter: str) -> None:
    """Requests that join a running batch, one a step, with prompts of several chunks."""
    engine = engines("gemma-4-31B", mtp=True, causal_lm="llama", max_num_batched_tokens=16)
    expected = plain(engine, REQUESTS)
    sequences = [
        engine.make_sequence(prompt, params, drafter=drafter) for prompt, params in REQUESTS
    ]
    for sequence in sequences:
        engine.add(sequence)
        engine.step()
        engine.check_integrity()
    finish(engine)
    assert [sequence.output_ids for sequence in sequences] == expected


@pytest.mark.parametrize("drafter", ["ngram", "mtp", "causal_lm", "ngram+causal_lm"])
def test_cancelling_frees_blocks_and_changes_no_other_token(engines, drafter: str) -> None:
    """Sequences that decode, that are half prefilled and that wait are cancelled at once."""
    engine = engines(
        "gemma-4-31B", mtp=True, causal_lm="llama", max_num_seqs=6, max_num_batched_tokens=16
    )
    expected = plain(engine, REQUESTS)
    sequences = [
        engine.make_sequence(prompt, params, drafter=drafter) for prompt, params in REQUESTS
    ]
    for sequence in sequences:
        engine.add(sequence)
    while sequences[1].num_output_tokens < 4:
        engine.step()
    cancelled = [
        next(s for s in sequences if s.num_output_tokens > 0),
        next(s for s in sequences if blocks_of(s) and s.num_output_tokens == 0),
        next(s for s in reversed(sequences) if not blocks_of(s)),
    ]
    for sequence in cancelled:
        engine.cancel(sequence)
    used = engine.load.num_blocks_used
    freed = sum(map(num_blocks_of, cancelled))
    assert freed > 0
    deltas = {delta.sequence: delta for delta in engine.step()}
    engine.check_integrity()
    for sequence in cancelled:
        assert sequence.finish_reason is deltas[sequence].finish_reason is FinishReason.CANCELLED
        assert num_blocks_of(sequence) == 0
    taken = sum(num_blocks_of(s) for s in sequences if s not in cancelled)
    assert engine.load.num_blocks_used == taken
    assert used > 0
    finish(engine)
    for sequence, output in zip(sequences, expected, strict=True):
        if sequence in cancelled:
            assert sequence.output_ids == output[: sequence.num_output_tokens]
        else:
            assert sequence.output_ids == output


def test_stopping_generate_early_frees_everything(engines) -> None:
    """A caller that drops the iterator leaves nothing behind."""
    engine = engines("llama")
    outputs = engine.generate([prompt for prompt, _ in REQUESTS], PARAMS)
    next(outputs)
    outputs.close()
    assert not engine.has_work
    assert engine.load.num_blocks_used == 0


def test_abort_ends_every_sequence_with_the_error(engines) -> None:
    engine = engines("llama", max_num_seqs=6)
    sequences = [engine.make_sequence(prompt, params) for prompt, params in REQUESTS]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    error = RuntimeError("the device is gone")
    deltas = engine.abort(error)
    assert {delta.sequence for delta in deltas} == set(sequences)
    assert all(s.finish_reason == "error" and s.error is error for s in sequences)


def test_a_step_that_fails_half_way_can_be_aborted(
    engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sequence has ended in it already, the second has not."""
    engine = engines("llama")
    params = SamplingParams(max_tokens=1)
    sequences = [engine.make_sequence(prompt_of(5 + i), params) for i in range(2)]
    late = engine.make_sequence(prompt_of(9), params)
    for sequence in sequences:
        engine.add(sequence)
    real, calls = engine._advance, []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("injected")
        return real(*arguments)

    monkeypatch.setattr(engine, "_advance", fail_at_the_second)
    with pytest.raises(MemoryError):
        engine.step()
    assert [sequence.is_finished for sequence in sequences] == [True, False]
    engine.add(late)
    error = RuntimeError("a step failed")
    deltas = engine.abort(error, waiting=False)
    assert [delta.sequence for delta in deltas] == sequences
    assert all(s.finish_reason == "error" and s.error is error for s in sequences)
    engine.check_integrity()
    finish(engine)
    assert late.error is None


@pytest.mark.parametrize("drafter", ["ngram", "mtp", "causal_lm", "ngram+causal_lm"])
def test_drafters_forget_what_has_ended(engines, wing: str, drafter: str) -> None:
    """Nothing about a sequence outlives it, however it ended; a GPU's slots are given anew."""
    engine = engines("gemma-4-31B", mtp=True, causal_lm="llama")
    sequences = [
        engine.make_sequence(prompt, params, drafter=drafter) for prompt, params in REQUESTS
    ]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(6):
        engine.step()
    kept = [
        value
        for name in drafter.split("+")
        for value in vars(engine.drafters[name]).values()
        if isinstance(value, dict) and set(value) & {sequence.id for sequence in sequences}
    ]
    assert bool(kept) != (wing == "cuda" and drafter == "mtp")
    engine.cancel(sequences[0])
    finish(engine)
    assert not any(kept)


def test_the_same_seed_gives_the_same_tokens(engines) -> None:
    """Another seed, or none, gives others: 24 tokens are never equal by chance."""
    engine = engines("llama")
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.3, ignore_eos=True)
    prompt = prompt_of(5)
    seeds = [7, 7, 8, 2**64 - 1, None, None]
    outputs = plain(engine, [(prompt, replace(params, seed=seed)) for seed in seeds])
    assert outputs[0] == outputs[1]
    assert len({tuple(output) for output in outputs}) == 5


def test_requests_are_split_among_drafters_by_weight(engines) -> None:
    """Those that name none; within 2% of the weights over 1,000 requests."""
    engine = engines("llama", causal_lm="llama", drafter_weights={"ngram": 3, "none": 1})
    random.seed(0)
    prompt = prompt_of(5)
    drafters = [engine.make_sequence(prompt).drafter for _ in range(1000)]
    assert abs(drafters.count("ngram") / 1000 - 0.75) < 0.02
    assert set(drafters) == {"ngram", "none"}
    assert engine.make_sequence(prompt, drafter="causal_lm").drafter == "causal_lm"
