"""`tandem doctor --exact`: answers are compared in all ways, and a difference is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from doubles import prompt_of
from tandem import Engine
from tandem_doctor import cli, exactness
from tandem_doctor.exactness import Comparison, compare, num_answers
from tiny_engines import Engines, TinyModels

PROMPTS = [prompt_of(3 + n, seed=n) for n in range(5)]
OPTIONS: dict[str, Any] = {"temperatures": (0.0, 1.0), "max_tokens": 12, "batch_size": 4}


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts, the second answer's token 7 is another."""
    answers = exactness._answers

    def spoilt(engine: Engine, drafter: str, *arguments: Any) -> list[list[int]]:
        found = answers(engine, drafter, *arguments)
        if drafter != "none":
            found[1][7] += 1
        return found

    monkeypatch.setattr(exactness, "_answers", spoilt)


def test_all_ways_are_compared(engines: Engines) -> None:
    steps: list[None] = []
    engine = engines("llama", mtp=False)
    found = compare(engine, ["ngram"], PROMPTS, **OPTIONS, progress=lambda: steps.append(None))
    assert [(each.way, each.temperature) for each in found] == [
        (way, temperature)
        for temperature in (0.0, 1.0)
        for way in ("none, 4 at a time", "ngram, 1 at a time", "ngram, 4 at a time")
    ]
    assert all((each.same, each.answers, each.first_difference) == (5, 5, None) for each in found)
    assert len(steps) == num_answers(1, len(PROMPTS), 2)


def test_a_difference_is_found(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    found = compare(engines("llama"), ["ngram"], PROMPTS, **OPTIONS)
    assert found[0] == Comparison("none, 4 at a time", 0.0, 5, 5, None)
    assert found[1] == Comparison("ngram, 1 at a time", 0.0, 4, 5, 7)


@pytest.mark.slow
def test_the_command(
    tiny: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = {
        "verifier": str(tiny.verifier("llama")),
        "dtype": "float32",
        "drafters": {"ngram": {"min_ngram_size": 1}},
        "max_num_seqs": 4,
        "max_model_len": 128,
        "enforce_eager": True,
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    arguments = [str(tmp_path / "model.json"), "--exact", "--max-tokens", "16"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "ngram, 4 at a time  8 of 8" in output
    assert "Every answer is the same, token by token." in output
    spoil(monkeypatch)
    assert cli.main(arguments) == 3
    assert "7 of 8; one differs after 7 tokens" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 3
    assert {each["same"] for each in json.loads(capsys.readouterr().out)} == {7, 8}
