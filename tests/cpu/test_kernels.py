"""The kernels beside attention: what they compute, and what happens without a compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from doubles import plain, prompt_of
from tandem import Engine, EngineConfig, SamplingParams, UnsupportedModelError
from tandem.cpu.blocked_matrix import BlockedMatrix
from tandem.cpu.kernels import FusedRMSNorm, exp_sums, fuse_norms, likeliest_token
from tandem.cpu.kernels.build import library, operator_library
from tandem.cpu.kernels.operators import load_operators
from tandem.cpu.packing import can_pack
from tiny_engines import DEVICE, TinyModels

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernels are for CPUs")

# --- RMSNorm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 16, 40, 640])
@pytest.mark.parametrize("kind", [Gemma3RMSNorm, Gemma4RMSNorm, LlamaRMSNorm])
@torch.inference_mode()
def test_fused_norms_equal_their_originals(
    kind: Callable[..., nn.Module], dim: int, dtype: torch.dtype
) -> None:
    """By one rounding; the mean of squares is summed in another order."""
    norm = kind(dim, eps=1e-3)
    norm.weight.copy_(torch.randn(dim))
    model = nn.ModuleList([norm.to(dtype)])
    fuse_norms(model)
    assert isinstance(model[0], FusedRMSNorm)
    rows = (torch.randn(1, 5, 3, dim) * torch.logspace(-3, 3, 5).view(5, 1, 1)).to(dtype)
    for shaped in (rows, rows.transpose(1, 2)):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(model[0](shaped), norm(shaped), rtol=tolerance, atol=1e-6)


def test_a_norm_that_is_none_of_them_stays() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 0.1

    model = nn.ModuleList([OddRMSNorm(16), nn.LayerNorm(16)])
    fuse_norms(model)
    assert [type(each) for each in model] == [OddRMSNorm, nn.LayerNorm]


# --- sums of exponentials


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_candidates", [256, 4096, 50257])
def test_exp_sums_equal_torchs(num_candidates: int, dtype: torch.dtype) -> None:
    """Forbidden tokens count nothing, a row that is no number gives none, rows change no other."""
    logits = (torch.randn(9, num_candidates) * 5).to(dtype)
    logits[2, ::2] = -torch.inf
    logits[3, 7] = torch.nan
    rows = torch.tensor([8, 0, 2, 3, 5])
    temperature = torch.tensor([[1.0], [0.3], [2.0], [1.0], [1.0]])
    scores = logits[rows].double() / temperature
    highest = scores.amax(dim=-1, keepdim=True)
    found = exp_sums(logits, rows, temperature, highest.float())
    expected = (scores - highest).exp().sum(dim=-1, keepdim=True).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)
    alone = exp_sums(logits, rows[1:2], temperature[1:2], highest[1:2].float())
    assert torch.equal(alone, found[1:2])


# --- the likeliest token


def exact(states: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each row, and how far below the others are."""
    scores = states.double() @ head.double().T
    return scores, scores.amax(dim=-1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.sampled_from([1, 15, 16, 37, 1000]),
    dim=st.sampled_from([4, 30, 64, 100]),
    num_rows=st.sampled_from([1, 2, 7, 16, 19, 40]),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_likeliest_token_is_found(
    dtype: torch.dtype, seed: int, vocab_size: int, dim: int, num_rows: int, spread: float
) -> None:
    """Weights of very different sizes, tokens that are nearly the same, states of any size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn((vocab_size, 1), generator=generator).exp()
    head = torch.randn((vocab_size, dim), generator=generator) * sizes
    # Some tokens almost equal their neighbours.
    head[1::3] = head[: len(head) - 1 : 3][: len(head[1::3])] * (1 + 1e-3)
    head = head.to(dtype).contiguous()
    states = (torch.randn((num_rows, dim), generator=generator) * spread).to(dtype)
    found = likeliest_token(BlockedMatrix.plain(head))
    assert found is not None
    token_ids = found(states)
    if vocab_size > 1 and can_pack(CPU, dtype):
        # Read where oneDNN has put it, the head is the same.
        matrix = BlockedMatrix.packed(torch.ops.mkldnn._reorder_linear_weight(head, 16))
        assert matrix is not None
        from_packed = likeliest_token(matrix)
        assert from_packed is not None
        assert from_packed(states) == token_ids
    scores, best = exact(states, head)
    chosen = scores.gather(1, torch.tensor(token_ids).unsqueeze(1))
    size = head.double().norm(dim=1).max() * states.double().norm(dim=1, keepdim=True)
    assert (best - chosen <= 1e-6 * size).all()
    # Neither the other rows nor the threads make a difference.
    assert [found(row.unsqueeze(0)) for row in states] == [[token_id] for token_id in token_ids]
    torch.set_num_threads(3)
    try:
        assert found(states) == token_ids
    finally:
        torch.set_num_threads(1)


def test_the_first_of_equal_tokens_is_taken() -> None:
    head = torch.randn(16, 8).repeat(20, 1)
    found = likeliest_token(BlockedMatrix.plain(head))
    assert found is not None
    states = torch.randn(9, 8)
    assert found(states) == (states @ head[:16].T).argmax(dim=-1).tolist()


def test_states_that_are_no_numbers_have_no_token() -> None:
    found = likeliest_token(BlockedMatrix.plain(torch.randn(100, 8)))
    assert found is not None
    states = torch.randn(4, 8)
    states[1, 3], states[2, 5] = float("nan"), float("inf")
    assert [token_id < 0 for token_id in found(states)] == [False, True, True, False]


def test_too_many_candidates_are_left_to_others() -> None:
    """A state of zeros likes all tokens the same."""
    head = torch.randn(100_000, 8)
    found = likeliest_token(BlockedMatrix.plain(head))
    assert found is not None
    assert found(torch.stack([torch.zeros(8), torch.ones(8)]))[0] == -1


# --- without a compiler


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing can be compiled, and nothing has been."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (library, operator_library, load_operators):
        cached.cache_clear()
    yield
    for cached in (library, operator_library, load_operators):
        cached.cache_clear()


def test_without_a_compiler_the_text_is_the_same(
    engines, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    requests = [(prompt_of(length), params) for length in (1, 9, 40)]
    expected = plain(engines("gemma-3"), requests)
    caplog.set_level(logging.INFO)
    engine = engines.make("gemma-3")
    assert "no compiler for kernels" in caplog.text
    assert "no compiler for operators" in caplog.text
    assert "batch_invariant is off" in caplog.text
    assert plain(engine, requests) == expected


def test_a_compiler_that_fails_is_no_error(
    tiny: TinyModels,
    no_compiler: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert library(CPU, torch.float32) is None
    assert "no such flag" in caplog.text


def test_batch_invariance_needs_the_kernels(tiny: TinyModels, no_compiler: None) -> None:
    config = EngineConfig(str(tiny.verifier("llama")), dtype="float32", batch_invariant=True)
    with pytest.raises(UnsupportedModelError, match=r"batch_invariant: .* install a C\+\+ comp"):
        Engine(config)
