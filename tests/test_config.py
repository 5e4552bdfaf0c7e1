"""Configuration: every bad value is refused by name, with what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem import ConfigError, EngineConfig, InvalidRequestError, SamplingParams


def write(directory: Path, **values: Any) -> Path:
    path = directory / "model.json"
    path.write_text(json.dumps(values))
    return path


def test_defaults_decode_plainly() -> None:
    config = EngineConfig(verifier="model")
    assert config.drafter_name == "none"
    assert config.drafter_configs == {}


def test_the_first_drafter_is_the_default() -> None:
    drafters: dict[str, Any] = {"ngram": {}, "other": {"type": "ngram"}}
    assert EngineConfig(verifier="model", drafters=drafters).drafter_name == "ngram"
    config = EngineConfig(verifier="model", drafters=drafters, default_drafter="none")
    assert config.drafter_name == "none"


def test_a_drafters_type_is_its_name_unless_given() -> None:
    config = EngineConfig(
        verifier="model",
        drafters={"ngram": {"max_ngram_size": 7}, "assistant": {"type": "mtp", "model": "a"}},
    )
    assert config.drafter_configs["ngram"].type == "ngram"
    assert config.drafter_configs["ngram"].max_ngram_size == 7
    assert config.drafter_configs["assistant"].type == "mtp"
    assert config.drafter_configs["assistant"].num_speculative_tokens == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": ""}, "verifier"),
        ({"verifier": 3}, "verifier"),
        ({"verifier": "  "}, "verifier"),
        ({"device": []}, r"device must be a string, got \[\]"),
        ({"dtype": []}, r"unknown dtype \[\]"),
        ({"lookahead": {}}, "unknown lookahead {}"),
        ({"max_num_seqs": 10**9}, "max_num_seqs .* from 1 to 65536, got 1000000000"),
        ({"max_num_seqs": 10**5000}, "max_num_seqs .* got what is too large to show, of type int"),
        ({"max_num_batched_tokens": None}, "max_num_batched_tokens .* got None"),
        ({"max_num_batched_tokens": 10**12}, "max_num_batched_tokens"),
        ({"max_model_len": 10**12}, "max_model_len"),
        ({"kv_cache_tokens": 10**15}, "kv_cache_tokens"),
        ({"block_size": 10**9}, "block_size"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization .* got True"),
        ({"max_prefill_slowdown": 1}, "max_prefill_slowdown .* above 1 .* got 1"),
        ({"max_prefill_slowdown": 1e300}, "max_prefill_slowdown"),
        ({"max_prefill_slowdown": []}, "max_prefill_slowdown"),
        ({"synthetic_acceptance_rates": [True]}, "synthetic_acceptance_rates"),
        ({"default_drafter": []}, r"default_drafter \[\] is not configured; choose from none"),
        ({"default_drafter": {}}, "default_drafter {} is not configured"),
        ({"drafter_weights": 5}, "drafter_weights must map drafters to numbers, got 5"),
        ({"drafter_weights": []}, r"drafter_weights must map drafters to numbers, got \[\]"),
        ({"drafter_weights": {"none": 1e300}}, r"drafter_weights\.none"),
        (
            {"drafters": {str(n): {"type": "ngram"} for n in range(33)}},
            "drafters may be 32 at most",
        ),
        ({"dtype": "int8"}, r"unknown dtype 'int8'; known: auto, bfloat16"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number from 1 to 65536, got 0"),
        ({"max_num_seqs": True}, "max_num_seqs .* got True"),
        ({"max_num_seqs": 2.0}, r"max_num_seqs .* got 2\.0"),
        ({"block_size": 0}, "block_size"),
        ({"batch_invariant": 1}, 'batch_invariant must be true, false or "auto", got 1'),
        ({"batch_invariant": "on"}, "batch_invariant must be .* got 'on'"),
        ({"enforce_eager": "no"}, "enforce_eager must be true or false, got 'no'"),
        ({"max_num_seqs": 20, "max_num_batched_tokens": 19}, "max_num_batched_tokens .* 20"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"kv_cache_tokens": "many"}, "kv_cache_tokens .* 'many'"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization .* got 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
        ({"drafters": ["ngram"]}, "drafters must map names to settings"),
        ({"drafters": {"ngram": 4}}, r"drafters\.ngram: settings must be an object, got 4"),
        ({"default_drafter": "mtp"}, "default_drafter 'mtp' .* choose from none"),
    ],
)
def test_a_bad_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"verifier": "model", **changes})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("none", {"type": "ngram"}, "taken by plain decoding"),
        ("eagle", {}, r"drafters\.eagle: unknown type 'eagle'; known: causal_lm, mtp, ngram"),
        ("mtp", {}, r"drafters\.mtp: model must be a directory or hub id, got None"),
        ("mtp", {"model": 5}, r"drafters\.mtp: model must be a directory or hub id, got 5"),
        ("ngram", {"name": "x"}, "leave 'name' out"),
        ("a+b", {"type": "ngram"}, r"a name can't have a '\+'"),
        ("ngram", {"num_shared_tokens": -1}, "num_shared_tokens .* from 0 to 1073741824, got -1"),
        ("ngram", {"num_speculative_tokens": 0}, "num_speculative_tokens .* from 1 to 64, got 0"),
        ("ngram", {"num_speculative_tokens": 65}, "num_speculative_tokens"),
        ("ngram", {"num_speculative_tokens": "4"}, "num_speculative_tokens"),
        ("ngram", {"min_ngram_size": 0}, "min_ngram_size"),
        ("ngram", {"min_ngram_size": 3, "max_ngram_size": 2}, "max_ngram_size .* from 3 to 1024"),
        ("", {"type": "ngram"}, "a name must have 1 to 64 printable characters, got ''"),
        ("a\nb", {"type": "ngram"}, r"printable characters, got 'a\\nb'"),
        ("a" * 65, {"type": "ngram"}, "1 to 64 printable characters"),
        ("mtp", {"model": ""}, r"drafters\.mtp: model must be"),
        ("ngram", {"type": []}, r"drafters\.ngram: unknown type \[\]"),
        ("ngram", {"model": "a"}, r"drafters\.ngram: type 'ngram' has no 'model', got 'a'"),
        ("ngram", {"max_ngram_size": 10**9}, r"drafters\.ngram: max_ngram_size"),
        ("ngram", {"num_shared_tokens": 10**12}, r"drafters\.ngram: num_shared_tokens"),
        ("ngram", {"k": 4}, "unknown key 'k'; allowed: .*num_speculative_tokens"),
    ],
)
def test_a_bad_drafter_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(verifier="model", drafters={name: settings})


DRAFTERS: dict[str, Any] = {
    "ngram": {"num_speculative_tokens": 8},
    "mtp": {"model": "a", "num_speculative_tokens": 3},
    "small": {"type": "causal_lm", "model": "b"},
}


def test_lookup_joins_every_model() -> None:
    assert EngineConfig(verifier="model", drafters=DRAFTERS).max_lookaheads == {
        "none": 0,
        "ngram": 8,
        "mtp": 3,
        "small": 4,
        "ngram+mtp": 8,
        "ngram+small": 8,
    }
    joined = EngineConfig(verifier="model", drafters=DRAFTERS, default_drafter="ngram+small")
    assert joined.drafter_name == "ngram+small"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"eagle": 1}, "drafter_weights: 'eagle' is not configured; choose from none, ngram, mtp"),
        ({"mtp": -1}, r"drafter_weights\.mtp must be a number from 0 to 1000000000, got -1"),
        ({"mtp": "much"}, r"drafter_weights\.mtp .* got 'much'"),
        ({"mtp": float("nan")}, r"drafter_weights\.mtp .* got nan"),
        ({"mtp": 0, "none": 0}, "must not all be 0"),
    ],
)
def test_bad_weights_are_refused(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(verifier="model", drafters=DRAFTERS, drafter_weights=weights)


def test_an_unknown_key_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'speculate'; allowed: verifier, dtype, "):
        EngineConfig.from_json(write(tmp_path, verifier="model", speculate=True))


def test_a_missing_verifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'verifier' is required"):
        EngineConfig.from_json(write(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '"model"', "\ufeff{}", "", "[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.json"):
        EngineConfig.from_json(path)


def test_a_file_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    for depth in (900, 5000):
        path.write_text('{"verifier": "model", "device": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ConfigError, match=r"nested too deeply|device must be a string"):
            EngineConfig.from_json(path)


@pytest.mark.parametrize("verifier", ["", "a" * 5000, "a" * 1000, "a\0b", "\ud800"])
def test_a_verifier_that_can_be_no_path(tmp_path: Path, verifier: str) -> None:
    """An empty one was the directory of model.json."""
    path = write(tmp_path, verifier=verifier)
    if 0 < len(verifier) <= 4096:
        assert EngineConfig.from_json(path).verifier == verifier
    else:
        with pytest.raises(ConfigError, match=r"verifier must be a directory or hub id, got '"):
            EngineConfig.from_json(path)


def test_a_number_that_python_refuses_to_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text('{"verifier": "model", "max_num_seqs": ' + "1" * 5000 + "}")
    with pytest.raises(ConfigError, match=r"max_num_seqs .* got inf"):
        EngineConfig.from_json(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        EngineConfig.from_json(tmp_path / "nowhere.json")


def test_relative_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What doesn't exist there stays as it is: it may be a hub id."""
    (tmp_path / "verifier").mkdir()
    version = tmp_path / "model" / "1"
    version.mkdir(parents=True)
    (version / "assistant").mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(
        version,
        verifier="../../verifier",
        drafters={
            "mtp": {"model": "assistant"},
            "hub": {"type": "mtp", "model": "someone/assistant"},
            "ngram": {},
        },
    )
    config = EngineConfig.from_json(path)
    assert config.verifier == str((tmp_path / "verifier").resolve())
    assert config.drafter_configs["mtp"].model == str((version / "assistant").resolve())
    assert config.drafter_configs["hub"].model == "someone/assistant"
    assert config.drafter_configs["ngram"].model is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be a whole number from 0 .* got -1"),
        ({"max_tokens": 1.5}, r"max_tokens .* got 1\.5"),
        ({"max_tokens": True}, "max_tokens .* got True"),
        ({"temperature": -0.1}, r"temperature must be a number from 0 to 100, got -0\.1"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": "hot"}, "temperature .* got 'hot'"),
        ({"top_k": -2}, "top_k .* got -2"),
        ({"top_k": 2.0}, r"top_k .* got 2\.0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
    ],
)
def test_a_bad_sampling_parameter_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 1},
        {"min_p": 1.0},
        {"seed": 2**64 - 1},
        {"seed": 0},
        {"top_k": 10**9},
    ],
)
def test_the_limits_themselves_are_allowed(changes: dict[str, Any]) -> None:
    SamplingParams(**changes)


def test_a_tiny_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy


@pytest.mark.parametrize("rates", [[0.5, 0.6], [1.2], [-0.1], ["0.5"], 0.5])
def test_bad_synthetic_rates_are_refused(rates: Any) -> None:
    with pytest.raises(ConfigError, match="synthetic_acceptance_rates must be shares"):
        EngineConfig(verifier="model", synthetic_acceptance_rates=rates)


def test_an_unknown_lookahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown lookahead 'always'; known: adaptive, fixed"):
        EngineConfig(verifier="model", lookahead="always")
