"""Compiled passes give what the models themselves give, or the engine does without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tandem.cpu.compiler
import tandem.cpu.graph
import tandem.cpu.packing
from doubles import plain, prompt_of, tokens_of
from tandem import Engine, EngineConfig, SamplingParams
from tandem.cpu.kernels.build import operator_library
from tandem.cpu.kernels.operators import write_kv
from tiny_assistants import engine_with, make_assistant
from tiny_engines import DEVICE, TinyModels

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="graphs are made for CPUs")

# Full and sliding layers; shared K/V and embeddings by layer; a mixture of experts; neither.
NAMES = ["gemma-3", "gemma-4-E2B", "gemma-4-26B-A4B", "llama"]
REQUESTS = [
    (
        prompt_of(length),
        SamplingParams(max_tokens=30, temperature=temperature, seed=length, ignore_eos=True),
    )
    for length, temperature in ((1, 0.0), (3, 1.0), (14, 0.0), (20, 1.0), (90, 0.0), (2, 0.0))
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_verifier_gives_the_same_text(engines, name: str) -> None:
    """Alone and together, with drafts and without, beside prompts."""
    expected = plain(engines(name), REQUESTS)
    engine = engines(name, enforce_eager=False)
    assert engine.verifier.compiled is not None
    assert plain(engine, REQUESTS) == expected
    # As many threads as there are when it runs.
    torch.set_num_threads(3)
    try:
        assert tokens_of(engine, REQUESTS, drafter="ngram") == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_a_compiled_drafter_guesses_the_same(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence and more than the 8-bit products are for."""
    path = tiny.verifier("gemma-3")
    make_assistant(path)[0].save_pretrained(tmp_path)
    results = []
    # Tiny matrices too.
    monkeypatch.setattr(tandem.cpu.packing, "_INT8_SIZE", 1)
    for enforce_eager in (True, False):
        engine = engine_with(path, tmp_path, enforce_eager=enforce_eager)
        assert (engine.drafters["mtp"].compiled is None) == enforce_eager
        tokens = [tokens_of(engine, requests) for requests in (REQUESTS[:1], REQUESTS)]
        stats = engine.drafter_stats["mtp"]
        results.append((tokens, stats.num_draft_tokens, stats.num_accepted_tokens))
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["not written", "another layer"])
def test_a_wrong_graph_is_not_used(
    engines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    wrong: str,
) -> None:
    def write(keys: Tensor, values: Tensor, slots: Tensor, layer: int) -> Tensor:
        if wrong == "not written":
            slots = torch.zeros_like(slots)
        return write_kv(keys, values, slots, 0 if wrong == "another layer" else layer)

    monkeypatch.setattr(tandem.cpu.compiler, "write_kv", write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = engines.make("llama", enforce_eager=False)
    assert "compiled, it computes something else" in caplog.text
    assert engine.verifier.compiled is None
    assert plain(engine, REQUESTS) == plain(engines("llama"), REQUESTS)


@pytest.mark.slow
def test_states_are_not_capped_as_logits_are(tiny: TinyModels, tmp_path: Path) -> None:
    """Gemma 4 caps its logits behind the head."""
    model = AutoModelForCausalLM.from_pretrained(tiny.verifier("gemma-4-31B"))
    assert model.config.final_logit_softcapping
    with torch.no_grad():
        model.model.norm.weight.fill_(100.0)
    model.save_pretrained(tmp_path)
    outputs = []
    for enforce_eager in (True, False):
        settings = {"kv_cache_tokens": 512, "max_model_len": 64, "lookahead": "fixed"}
        config = EngineConfig(str(tmp_path), "float32", enforce_eager=enforce_eager, **settings)
        engine = Engine(config)
        assert (engine.verifier.compiled is None) == enforce_eager
        sequence = engine.make_sequence(prompt_of(3), REQUESTS[0][1], drafter="none")
        engine.add(sequence)
        with torch.inference_mode():
            outputs.append(engine.verify(engine.schedule()).hidden)
        engine.cancel(sequence)
        engine.step()
    assert outputs[0].abs().max() > 40
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_a_graph_is_compiled_once_and_anew_where_it_is_damaged(
    engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO", "tandem")
    expected = plain(engines("llama", enforce_eager=False), REQUESTS)
    copy_cache(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.clear()
    assert plain(engines.make("llama", enforce_eager=False), REQUESTS) == expected
    assert "compiling" not in caplog.text
    for kept in (tmp_path / "tandem").glob("*.pt2"):
        whole = kept.read_bytes()
        kept.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        engine = engines.make("llama", enforce_eager=False)
        assert engine.verifier.compiled is not None
        assert plain(engine, REQUESTS) == expected
        assert caplog.text.count("compiling") == 1
    assert ".pt2 is damaged: making it anew" in caplog.text
    assert "runs uncompiled" not in caplog.text

    # Another model has another graph, whatever it shares with the first.
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not again")

    monkeypatch.setattr(torch.export, "export", fail)
    engines.make("llama", enforce_eager=False, dtype="bfloat16")
    assert caplog.text.count("compiling") == 2


def copy_cache(directory: Path, *left_out: str) -> None:
    """What this session has compiled, in a cache home of its own."""
    kept = Path(os.environ["XDG_CACHE_HOME"], "tandem")
    shutil.copytree(kept, directory / "tandem", ignore=shutil.ignore_patterns(*left_out))


@pytest.mark.slow
def test_a_cache_too_small_for_the_examples_is_no_error(
    engines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tandem")
    engine = engines.make("llama", enforce_eager=False, block_size=1)
    assert "runs uncompiled: the cache has 8192 blocks of 1 tokens, and 6 of 2" in caplog.text
    assert engine.verifier.compiled is None


def test_a_compiler_that_fails_is_no_error(
    engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch.export, "export", fail)
    engine = engines.make("qwen-3", enforce_eager=False)
    assert (
        "Qwen3ForCausalLM runs uncompiled, which is slower: RuntimeError: no such thing"
        in caplog.text
    )
    assert engine.verifier.compiled is None


@pytest.mark.slow
def test_compiling_needs_no_locale(tiny: TinyModels, tmp_path: Path) -> None:
    """As in a server, whose interpreter takes files for ASCII where no locale is set."""
    operator_library()
    copy_cache(tmp_path, "graph-*")
    code = (
        "import sys\n"
        "from tandem import Engine, EngineConfig\n"
        "engine = Engine(EngineConfig(verifier=sys.argv[1], device='cpu'))\n"
        "assert engine.verifier.compiled is not None\n"
    )
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }
    command = [sys.executable, "-c", code, str(tiny.verifier("llama"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
