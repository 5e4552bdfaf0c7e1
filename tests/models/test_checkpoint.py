"""A damaged checkpoint is refused in one line, which names the key and what is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem import ConfigError, Engine
from tandem.models.checkpoint import load_model
from tiny_engines import TinyModels, config_of
from tiny_models import save_verifier


def refusal(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(str(path), torch.float32, torch.device("cpu"), key="verifier")
    said = str(caught.value)
    assert said.startswith("verifier: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.fixture
def verifier(tmp_path: Path) -> Path:
    return save_verifier("llama", tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, 50_000])
def test_weights_that_are_cut_off_are_named(verifier: Path, size: int) -> None:
    weights = verifier / "model.safetensors"
    os.truncate(weights, size)
    said = refusal(verifier)
    assert f"{weights} is damaged" in said
    assert "download or copy it again" in said


def test_of_several_files_the_damaged_one_is_named(verifier: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(verifier)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    os.truncate(shards[1], shards[1].stat().st_size - 1)
    assert f"{shards[1]} is damaged" in refusal(tmp_path / "shards")


def test_a_drafters_key_is_named(tiny: TinyModels, verifier: Path) -> None:
    os.truncate(verifier / "model.safetensors", 1000)
    for kind in ("mtp", "causal_lm"):
        drafters = {"mine": {"type": kind, "model": str(verifier)}}
        with pytest.raises(ConfigError, match=rf"drafters\.mine\.model: {verifier}/model\.safe"):
            Engine(config_of(tiny.verifier("llama"), drafters=drafters))


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: "",
        lambda config: "[]",
        lambda config: "[" * 100_000,
        lambda config: json.dumps({**config, "model_type": "nothing"}),
        lambda config: json.dumps({**config, "hidden_size": "x"}),
        lambda config: json.dumps({**config, "hidden_size": 16}),
        lambda config: json.dumps({**config, "num_attention_heads": 0}),
    ],
)
def test_a_config_json_that_is_wrong(verifier: Path, edit: Callable[[Any], str]) -> None:
    config = verifier / "config.json"
    config.write_text(edit(json.loads(config.read_text())))
    assert str(verifier) in refusal(verifier)


def test_weights_of_another_kind_that_are_no_weights(verifier: Path) -> None:
    (verifier / "model.safetensors").unlink()
    (verifier / "pytorch_model.bin").write_bytes(b"junk")
    assert str(verifier) in refusal(verifier)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "no/such/model", " "])
def test_a_name_that_can_be_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "can't load the model" in refusal(name)
