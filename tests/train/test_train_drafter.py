"""The three stages of training, as a user runs them, on a tiny verifier."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.drafters.assistant import Assistant
from tandem.errors import ConfigError, DrafterMismatchError
from tandem.models.checkpoint import load_model
from tandem_runtime.paths import ROOT
from tandem_train.cli import main
from tandem_train.corpus import Corpus, TrainingText
from tandem_train.evaluate import evaluate, read_prompts
from tandem_train.generate import generate
from tandem_train.train import TrainingConfig, save, train
from tiny_engines import TinyModels

SCRIPT = ROOT / "scripts" / "train_drafter.py"
SIZES = ["--num-sequences", "240", "--sequence-length", "48", "--dtype", "float32"]
TRAINING = ["--epochs", "6", "--batch-size", "8", "--learning-rate", "3e-3"]


def command(stage: str, verifier: Path, directory: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), stage, str(verifier), str(directory), *options]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The command in this process, where all is imported; it leaves its signals alone."""
    monkeypatch.setattr(sys, "argv", list(map(str, command(*arguments)[1:])))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return main()


def interrupt(shown: str, number: signal.Signals, *arguments: Any) -> int:
    """Starts a stage, sends it a signal once it has shown a text, and returns its exit status."""
    with subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        output = b""
        while not re.search(shown, output.decode(errors="replace")):
            output += (part := os.read(process.stderr.fileno(), 4096))
            assert part, f"it ended before it could be interrupted: {output.decode()}"
        process.send_signal(number)
        process.communicate(timeout=60)
        return process.returncode


def log_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_stages_survive_interruptions_and_teach_the_drafter(
    tiny: TinyModels, tmp_path: Path
) -> None:
    verifier, directory = tiny.verifier("gemma-3"), tmp_path / "work"
    corpus = Corpus(directory / "corpus")
    arguments = (verifier, directory, *SIZES, *TRAINING, "--max-tokens", "16")

    # A kill leaves all lines but perhaps the last; Ctrl-C leaves all of them.
    assert interrupt(r" [2-9]\d/240", signal.SIGKILL, "generate", *arguments) == -signal.SIGKILL
    before = {text.index: text for text in corpus}
    assert interrupt(r" 1\d\d/240", signal.SIGINT, "generate", *arguments) == 130
    assert len(before) < len(list(corpus)) < 240
    assert interrupt(r" [3-9]\d/168", signal.SIGINT, "all", *arguments) == 130
    texts = {text.index: text for text in corpus}
    assert sorted(texts) == list(range(240))
    assert all(texts[index] == text for index, text in before.items())
    stopped_at = log_of(directory)[-1]["step"]

    result = run("all", *arguments)
    assert result.returncode == 0, result.stderr
    steps = [entry["step"] for entry in log_of(directory) if "loss" in entry]
    assert steps == list(range(6 * (228 // 8)))
    assert 29 <= stopped_at < steps[-1]
    assert (directory / "training.png").stat().st_size > 5000
    assert "a round of 4 drafts" in result.stdout
    report = json.loads((directory / "evaluation.json").read_text())
    for temperature in ("0", "1"):
        assert report["results"][temperature]["all"]["same_text"] == 40
    # Greedy: under shared noise a tiny verifier's flat distribution is guessed without training.
    trained = report["results"]["0"]["all"]["mean_acceptance_length"]
    untrained = untrained_length(verifier, directory)
    assert trained > untrained + 0.5, (trained, untrained)


def untrained_length(verifier: Path, directory: Path) -> float:
    """The greedy mean acceptance length of a drafter with random weights."""
    drafter = load_model(str(directory / "drafter"), torch.float32, torch.device("cpu"))
    assert isinstance(drafter, Assistant)
    torch.manual_seed(0)
    for weight in drafter.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    save(drafter, directory / "untrained")
    settings = {
        "type": "mtp",
        "model": str(directory / "untrained"),
        "num_speculative_tokens": 4,
    }
    prompts = read_prompts(ROOT / "prompts" / "held_out.jsonl")
    report = evaluate(
        str(verifier), settings, prompts, max_tokens=16, temperatures=[0.0], dtype="float32"
    )
    length: float = report["results"]["0"]["all"]["mean_acceptance_length"]
    return length


@pytest.mark.slow
def test_a_text_depends_on_seed_and_index_alone(tiny: TinyModels, tmp_path: Path) -> None:
    verifier = str(tiny.verifier("llama"))
    settings: dict[str, Any] = {"sequence_length": 24, "seed": 5, "dtype": "float32"}
    whole, parts = Corpus(tmp_path / "whole"), Corpus(tmp_path / "parts")
    generate(verifier, whole, num_sequences=12, **settings)
    generate(verifier, parts, num_sequences=5, **settings)
    generate(verifier, parts, num_sequences=12, **settings)
    assert list(whole) == list(parts)


def test_a_line_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    for index in range(3):
        corpus.append(TrainingText(index, [1, 2, 3], 1, 0.0))
    shard = next(tmp_path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    assert [text.index for text in corpus] == [0, 1]
    corpus.append(TrainingText(2, [1, 2, 3], 1, 0.0))
    assert [text.index for text in corpus] == [0, 1, 2]


def test_every_twentieth_text_is_held_out() -> None:
    held_out = [i for i in range(60) if TrainingText(i, [1], 1, None).is_held_out]
    assert held_out == [19, 39, 59]


@pytest.mark.slow
def test_text_files_are_added_once(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Tandem bicycles have two saddles. " * 10)
    options = ["--num-sequences", "2", "--sequence-length", "32", "--dtype", "float32"]
    options += ["--text", str(file)]
    for _ in range(2):
        found = run_here(
            monkeypatch, "generate", tiny.verifier("llama"), tmp_path / "work", *options
        )
        assert found == 0
        texts = list(Corpus(tmp_path / "work" / "corpus"))
        assert [text.temperature for text in texts].count(None) == 11
        assert len(texts) == 13


def test_too_few_texts_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    texts = [TrainingText(index, [3, 4, 5, 6], 1, 1.0) for index in range(4)]
    with pytest.raises(ConfigError, match=r"4 texts to train on in .* one update takes 8"):
        train(str(tiny.verifier("llama")), texts, TrainingConfig(batch_size=8), tmp_path)


def test_a_trained_drafter_is_trained_further(tiny: TinyModels, tmp_path: Path) -> None:
    texts = [TrainingText(index, [3, 4, 5, 6, 7, 8], 1, 0.0) for index in range(24)]
    verifier, first, second = str(tiny.verifier("llama")), tmp_path / "1", tmp_path / "2"
    config = TrainingConfig(batch_size=8, epochs=4, draft_vocab_size=5)
    train(verifier, texts, config, first, dtype="float32")
    others = [TrainingText(index, [9, 10, 11, 12, 13], 1, 0.0) for index in range(8)]
    again = TrainingConfig(batch_size=8, epochs=1, start_from=str(first / "drafter"))
    train(verifier, [*texts, *others], again, second, dtype="float32")
    for name in ("source_layers", "draft_vocab_size"):
        settings = [json.loads((d / "drafter/config.json").read_text()) for d in (first, second)]
        assert settings[0][name] == settings[1][name]
    loss = [[entry["loss"][0] for entry in log_of(d) if "loss" in entry] for d in (first, second)]
    assert loss[1][0] < loss[0][0]
    with pytest.raises(DrafterMismatchError, match="model_type is llama there and qwen3 here"):
        train(str(tiny.verifier("qwen-3")), texts, again, tmp_path / "3", dtype="float32")
    again = TrainingConfig(batch_size=8, start_from=verifier)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM, not a drafter"):
        train(verifier, texts, again, tmp_path / "4", dtype="float32")


def test_a_checkpoint_of_other_settings_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    texts = [TrainingText(index, [3, 4, 5, 6, 7, 8], 1, 0.0) for index in range(24)]
    verifier = str(tiny.verifier("llama"))
    train(verifier, texts, TrainingConfig(batch_size=8, epochs=1), tmp_path, dtype="float32")
    with pytest.raises(ConfigError, match=r"other settings .*'epochs': 1.*'epochs': 2.* delete it"):
        train(verifier, texts, TrainingConfig(batch_size=8, epochs=2), tmp_path, dtype="float32")


@pytest.mark.slow
def test_errors_are_one_line_and_help_has_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run("generate", tmp_path / "absent", tmp_path)
    assert result.returncode == 1
    assert re.match(
        r"error: verifier: can't load the model '.*absent'", result.stderr.splitlines()[-1]
    )
    assert "Traceback" not in result.stderr
    with pytest.raises(SystemExit):
        run_here(monkeypatch, "--help", tmp_path, tmp_path)
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert all(stage in shown for stage in ("generate", "train", "evaluate", "all"))


def test_a_broken_line_of_prompts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"kind": "prose", "prompt": "Once"}\n{"kind": "prose"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: expected .* got"):
        read_prompts(path)


def test_the_held_out_prompts_are_five_of_each_kind() -> None:
    prompts = read_prompts(ROOT / "prompts" / "held_out.jsonl")
    kinds = [prompt.kind for prompt in prompts]
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 40
    assert {kinds.count(kind) for kind in kinds} == {5}
