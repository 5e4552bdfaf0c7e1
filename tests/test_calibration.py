"""The sweep that measures costs: it leaves nothing behind, and is done once for a configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made_up_costs import costs
from tandem import Engine, EngineConfig, SamplingParams, kept_costs
from tandem.cache_files import keep_file
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.costs import CostModel, Costs
from tandem.lookahead.curve import Curve
from tiny_engines import TinyModels


@pytest.fixture
def load(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes adaptive engines whose costs are kept in `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = str(tiny.verifier("llama"))
    drafters = {"ngram": {}, "causal_lm": {"model": model}}

    def make(**changes: Any) -> Engine:
        settings = {
            "verifier": model,
            "dtype": "float32",
            "drafters": drafters,
            "max_num_seqs": 4,
            "max_model_len": 100,
            "enforce_eager": True,
            **changes,
        }
        return Engine(EngineConfig(**settings))

    return make


def kept(directory: Path) -> list[Path]:
    return list((directory / "tandem").glob("costs-*.json"))


def test_costs_are_measured_once(
    load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "tandem"):
        engine = load()
        assert "measured costs of drafting and verifying" in caplog.text
        caplog.clear()
        load()
        assert "measured costs" not in caplog.text
        load(max_num_seqs=5)
        assert "measured costs" in caplog.text
    assert len(kept(tmp_path)) == 2
    assert isinstance(engine.lookahead, AdaptiveLookahead)
    model = engine.lookahead.costs
    assert 0 < model.verify(1, 1) <= model.verify(32, 1) <= model.verify(32, 4)
    for drafter in engine.drafters:
        assert 0 <= model.draft(drafter, 1, 1) <= model.draft(drafter, 4, 4)
    assert model.draft("causal_lm", 1, 2) > model.draft("ngram", 1, 2)
    # Nothing is left of the made-up sequences.
    engine.check_integrity()
    assert engine.load.num_blocks_used == 0
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    outputs = [next(engine.generate([[9, 8, 7]], params, drafter=n)) for n in ("none", "causal_lm")]
    assert outputs[0].token_ids == outputs[1].token_ids


def zeros(value: Any) -> Any:
    """The same, with nothing but zeros for numbers."""
    return {key: zeros(each) for key, each in value.items()} if isinstance(value, dict) else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: json.dumps(zeros(json.loads(text))),
    ],
)
def test_a_file_that_is_wrong_is_made_anew(
    load: Any, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    load()
    [path] = kept(tmp_path)
    good = path.read_text()
    path.write_text(damage(good))
    engine = load()
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    assert len(next(engine.generate([[9, 8, 7]], params)).token_ids) == 12
    [path] = kept(tmp_path)
    assert json.loads(path.read_text()).keys() == json.loads(good).keys()


def test_a_sound_file_without_costs_is_made_anew(
    load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    [path] = kept(tmp_path)
    path.unlink()
    wrong = keep_file(f"{path.stem.rpartition('-')[0]}.json", lambda path: path.write_text("[]"))
    load()
    assert f"{wrong} holds no costs, measuring again" in caplog.text
    assert not wrong.exists()
    assert len(kept(tmp_path)) == 1


def test_costs_of_a_busy_machine_are_not_kept(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_costs, "_BUSY", -1.0)
    assert isinstance(load().lookahead, AdaptiveLookahead)
    assert "the next start measures again" in caplog.text
    assert kept(tmp_path) == []


def test_old_costs_are_measured_again(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    [path] = kept(tmp_path)
    monkeypatch.setattr(kept_costs, "_MAX_AGE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "tandem"):
        load()
    assert f"{path} is from another time, measuring again" in caplog.text


def test_costs_that_service_disagrees_with_for_long_are_dropped(
    load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load().lookahead.costs
    assert len(kept(tmp_path)) == 1
    for _ in range(2000):
        model.observe_verify(1, 1, 0, model._costs.verify(1))
        model.observe_verify(16, 1, 0, 4 * model._costs.verify(16))
    assert kept(tmp_path) == []
    assert "measured costs of passes are wrong here" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"verify": {}},
        {"verify": {"1": 0}},
        {"verify": {"1": float("nan")}},
        {"verify": {"one": 0.1}},
        {"verify": {"1": "0.1"}},
        {"verify": 5},
        {"sequence": -1},
        {"sequence": None},
        {"prompt_token": float("inf")},
        {"draft": []},
        {"spread": None},
        {"measured_at": "today"},
        {"draft": {"ngram": {"begin": {"1": 0}}}},
        {"draft": {"ngram": {"begin": {}, "guess": {"1": 0}}}},
    ],
)
def test_what_are_no_costs_is_refused(changes: dict[str, Any]) -> None:
    values = json.loads(json.dumps(costs("ngram").to_json()))
    assert Costs.from_json(values).to_json() == costs("ngram").to_json()
    with pytest.raises(ValueError, match=r"\w"):
        Costs.from_json({**values, **changes})


def test_a_pool_with_room_for_one_sequence_is_measured_too(load: Any) -> None:
    engine = load(max_num_seqs=1, kv_cache_tokens=112, max_num_batched_tokens=16)
    assert engine.load.num_blocks_used == 0
    assert engine.lookahead.costs.verify(4, 1) > 0


def test_costs_survive_a_file() -> None:
    made_up = costs("ngram", "model")
    again = Costs.from_json(json.loads(json.dumps(made_up.to_json())))
    assert again.to_json() == made_up.to_json()


def test_a_curve_is_linear_between_points_and_beyond() -> None:
    curve = Curve({2: 1.0, 4: 2.0, 8: 1.5})  # more never costs less
    assert [curve(n) for n in (1, 2, 3, 4, 6, 8, 12)] == [1.0, 1.0, 1.25, 1.5, 1.5, 1.5, 1.5]
    assert Curve({1: 3.0})(100) == 3.0


def test_what_is_observed_corrects_the_costs() -> None:
    model = CostModel(costs("model"))
    for _ in range(200):
        model.observe_verify(8, 8, 0, 2 * 0.0244)
        model.observe_draft("model", 4, 2, 0.02)
        model.observe_rest(0.001)
    assert model.verify(8, 8) == pytest.approx(2 * 0.0244, rel=0.05)
    assert model.draft("model", 4, 2) == pytest.approx(0.02, rel=0.05)
    assert model.rest == pytest.approx(0.001, rel=0.05)
    before = model.verify(8, 8)
    model.observe_verify(8, 8, 0, 10.0)  # a pause of the machine
    assert model.verify(8, 8) < 1.1 * before


def test_sequences_of_a_few_tokens_are_measured_too(load: Any) -> None:
    engine = load(max_model_len=8, kv_cache_tokens=8, block_size=2, max_num_seqs=1)
    assert engine.load.num_blocks_used == 0
    assert engine.lookahead.costs.verify(1, 1) > 0
