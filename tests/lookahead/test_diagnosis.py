"""Why speculation gains little: each reason, produced with engines and drafters that have it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import pytest

from doubles import HalfDrafter, OracleDrafter, plain, prompt_of
from made_up_costs import costs
from tandem import ConfigError, Engine, SamplingParams
from tandem.drafters.drafter import DraftRequest, GoesOn, always
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.costs import CostModel, Costs, DraftCosts
from tandem.lookahead.curve import Curve
from tandem.lookahead.diagnosis import ADVICE, Finding, Monitor, Reason, best_speedup
from tandem.metrics import DrafterStats
from tandem.requests.sequence import Draft
from tandem_doctor import cli
from tandem_doctor.checkup import check

NUM_TOKENS = 32
PROMPTS = [prompt_of(4 + n, seed=n) for n in range(8)]


class FixedCosts(CostModel):
    """Costs that stay as they were made up: the clock here isn't theirs."""

    def observe_verify(self, *_: Any) -> None:
        """Takes nothing."""

    def observe_draft(self, *_: Any) -> None:
        """Takes nothing."""


def examine(
    engine: Engine,
    drafter: str = "ngram",
    made_up: Costs | None = None,
    batch_size: int = 1,
    temperatures: Items[float] = (0.0, 1.0),
) -> list[Finding]:
    """A checkup under made-up costs."""
    engine.lookahead = AdaptiveLookahead(FixedCosts(made_up or costs(*engine.drafters)))
    return check(
        engine,
        drafter,
        PROMPTS,
        temperatures=temperatures,
        max_tokens=NUM_TOKENS,
        batch_size=batch_size,
    ).findings


@pytest.fixture
def engine(make_engine: Any) -> Engine:
    """A tiny Llama; a double takes the place of its n-gram drafter."""
    made: Engine = make_engine("llama", drafters={"ngram": {}})
    return made


def answers(engine: Engine, temperature: float) -> dict[int, list[int]]:
    """What the checkup's requests generate, by seed."""
    requests = [
        (prompt, SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS, seed=seed))
        for seed, prompt in enumerate(PROMPTS)
    ]
    return dict(enumerate(plain(engine, requests)))


class TimelyOracle(OracleDrafter):
    """Right for each request at one temperature, wrong at the others."""

    def __init__(self, outputs: dict[int, list[int]], temperature: float) -> None:
        super().__init__(outputs)
        self._temperature = temperature

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = super().propose(requests, goes_on)
        return [
            draft
            if request.sequence.params.temperature == self._temperature
            else Draft([token ^ 1 for token in draft.token_ids])
            for draft, request in zip(drafts, requests, strict=True)
        ]


class ShortSighted(OracleDrafter):
    """Right until texts get longer than those that it was trained on."""

    trained_length = 20

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = super().propose(requests, goes_on)
        return [
            draft
            if request.sequence.num_tokens <= self.trained_length
            else Draft([token ^ 1 for token in draft.token_ids])
            for draft, request in zip(drafts, requests, strict=True)
        ]


class EverySecond(OracleDrafter):
    """Its first guess is right half of the time, and then all are."""

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        drafts = super().propose(requests, goes_on)
        return [
            Draft([token ^ (r.sequence.num_tokens % 2) for token in draft.token_ids])
            for draft, r in zip(drafts, requests, strict=True)
        ]


class Tongue(HalfDrafter):
    """Can say only what it has said right so far."""

    vocabulary = frozenset[int]()


def reasons(findings: list[Finding]) -> list[Reason]:
    return [finding.reason for finding in findings]


def test_a_good_pair_has_nothing_wrong(engine: Engine) -> None:
    engine.drafters["ngram"] = OracleDrafter(answers(engine, 0.0))
    assert examine(engine, temperatures=[0.0]) == []


def test_a_wrong_pair(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An assistant with random weights, as for another verifier."""
    engine = engines("gemma-4-31B", mtp=True)
    monkeypatch.setattr(engine, "lookahead", engine.lookahead)
    [finding] = examine(engine, "mtp", temperatures=[0.0])
    assert finding.reason is Reason.WRONG_PAIR
    assert finding.figure < 0.05


def test_another_domain(engine: Engine) -> None:
    engine.drafters["ngram"] = HalfDrafter(answers(engine, 0.0))
    assert reasons(examine(engine, temperatures=[0.0])) == [Reason.OTHER_DOMAIN]


def test_a_high_temperature(engine: Engine) -> None:
    engine.drafters["ngram"] = TimelyOracle(answers(engine, 0.0), 0.0)
    assert reasons(examine(engine)) == [Reason.HIGH_TEMPERATURE]


def test_a_large_batch(engine: Engine) -> None:
    """The same drafter pays alone, and not among 64: there the pass is bound by arithmetic."""
    engine.drafters["ngram"] = EverySecond(answers(engine, 0.0))
    model = costs("ngram", "model").draft["model"]
    made_up = Costs(costs("ngram").verify, 2e-4, 3e-4, {"ngram": model})
    alone = examine(engine, made_up=made_up, temperatures=[0.0])
    among_64 = examine(engine, made_up=made_up, batch_size=64, temperatures=[0.0])
    assert Reason.LARGE_BATCH not in reasons(alone)
    assert reasons(among_64) == [Reason.LARGE_BATCH]
    assert among_64[0].figure == 64


def test_a_slow_drafter(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier as its own drafter: always right, and as slow as the verifier."""
    engine = engines("llama", causal_lm="llama")
    monkeypatch.setattr(engine, "lookahead", engine.lookahead)
    same = DraftCosts(Curve({1: 0.0}), Curve({1: 20e-3, 8: 23e-3}))
    made_up = Costs(costs("ngram").verify, 2e-4, 3e-4, {"causal_lm": same})
    [finding] = examine(engine, "causal_lm", made_up)
    assert finding.reason is Reason.SLOW_DRAFTER
    assert 0.9 < finding.figure < 1.03


def test_a_context_beyond_training(engine: Engine) -> None:
    engine.drafters["ngram"] = ShortSighted(answers(engine, 0.0))
    assert reasons(examine(engine, temperatures=[0.0])) == [Reason.LONG_CONTEXT]


def test_tokens_outside_the_draft_vocabulary(engine: Engine) -> None:
    engine.drafters["ngram"] = Tongue(answers(engine, 0.0))
    [finding] = examine(engine, temperatures=[0.0])
    assert finding.reason is Reason.OUTSIDE_VOCABULARY
    assert finding.figure == 1.0


def test_too_few_guesses_say_nothing(engine: Engine) -> None:
    assert engine.diagnose("ngram", DrafterStats()) == []
    assert engine.diagnose("none", DrafterStats()) == []


def test_every_reason_has_its_advice() -> None:
    assert set(ADVICE) == set(Reason)


def test_the_best_lookahead_follows_chances_and_batch() -> None:
    model = CostModel(costs("model"))
    assert best_speedup(model, "model", [0.9], 1, 8).num_speculative_tokens == 8
    few = best_speedup(model, "model", [0.3], 1, 8)
    assert 0 < few.num_speculative_tokens < 4
    assert best_speedup(model, "model", [0.3], 32, 8) == (0, 1.0)


def test_the_monitor_logs_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: Engine
) -> None:
    clock = [100.0]
    monkeypatch.setattr("tandem.lookahead.diagnosis.time.monotonic", lambda: clock[0])
    engine.monitor = Monitor(engine.diagnose)
    engine.drafters["ngram"] = HalfDrafter(answers(engine, 0.0))
    with caplog.at_level(logging.WARNING, "tandem"):
        examine(engine, temperatures=[0.0])
        assert engine.monitor.findings == {}
        clock[0] += 61
        examine(engine, temperatures=[0.0])
    assert reasons(engine.monitor.findings["ngram"]) == [Reason.OTHER_DOMAIN]
    [record] = [r for r in caplog.records if "gains little" in r.message]
    assert "speculation with ngram gains little: other_domain: 0." in record.message


# --- the command


@pytest.fixture
def config(tmp_path: Path, tiny: Any) -> Path:
    path = tmp_path / "model.json"
    values = {
        "verifier": str(tiny.verifier("llama")),
        "dtype": "float32",
        "enforce_eager": True,
        "drafters": {"ngram": {"min_ngram_size": 1}},
        "max_num_seqs": 4,
        "max_model_len": 200,
        "lookahead": "fixed",
    }
    path.write_text(json.dumps(values))
    return path


def test_the_command_prints_a_table_and_json(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('abc abc abc\n\n{"prompt": "def f"}\n')
    arguments = [str(config), "--prompts", str(prompts), "--max-tokens", "16"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "ngram: a verifier pass takes" in output
    assert "accepted by position" in output
    assert cli.main([*arguments, "--json"]) == 0
    [checkup] = json.loads(capsys.readouterr().out)
    assert checkup["drafter"] == "ngram"
    assert set(checkup["temperatures"]) == {"0", "1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "mtp"], "unknown drafter 'mtp'; configured: ngram"),
        (["--drafter", "none"], "unknown drafter 'none'"),
        (["--prompts", "/nowhere"], "No such file"),
    ],
)
def test_the_command_says_what_it_cannot_check(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([str(config), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_fixed_lookahead_cannot_be_checked(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="adaptive"):
        check(engine, "ngram")
