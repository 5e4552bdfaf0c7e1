"""Engines on the CUDA wing, in eager form and without a GPU, against those on the CPU's."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import triton_interpreter
from cuda_wing import cuda_wing
from tandem import Engine, SamplingParams
from tandem.cuda.attention import write_to_pool
from tandem.cuda.mlp import FusedMLP, fuse_mlps
from tandem.cuda.norms import FusedRMSNorm, fuse_norms
from tandem.cuda.pending import Pending, finished
from tandem.cuda.rotary import fuse_rotary
from tandem.models.attention import PackedBatch, Span
from tandem.models.packed_pass import packed_logits
from tandem.requests.sequence import BlockTable
from tandem_bench.launches import Launches, noted_kernels
from tiny_engines import Engines, TinyModels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is the wing")
PARAMS = SamplingParams(max_tokens=4, temperature=0.8, seed=3, ignore_eos=True)
PROMPTS = [[3 + n] * (5 + 9 * n) for n in range(2)]


def answers(engine: Engine, drafter: str) -> list[list[int]]:
    found = engine.generate(PROMPTS, PARAMS, drafter=drafter, num_speculative_tokens=2)
    return [list(each.token_ids) for each in found]


@pytest.mark.slow
def test_an_engine_writes_the_same(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, drafts, windows and what an assistant reads, with norms and attention fused."""
    triton_interpreter.mend(monkeypatch)
    expected = answers(engines("gemma-4-31B", mtp=True, causal_lm="gemma-3"), "mtp")
    with cuda_wing():
        # Programs of nobody take their time too in the interpreter.
        engine = engines.make("gemma-4-31B", mtp=True, max_num_seqs=len(PROMPTS))
        fused = [m for m in engine.verifier.model.modules() if isinstance(m, FusedRMSNorm)]
        assert len(fused) > 6 * 4
        assert answers(engine, "mtp") == expected
        engine.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize(("verifier", "most"), [("gemma-4-E2B", 22), ("llama", 17)])
def test_a_pass_could_be_in_a_graph(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, verifier: str, most: int
) -> None:
    """Nothing is read back, no shape depends on data, and a layer is so many launches at most."""
    triton_interpreter.mend(monkeypatch)
    with cuda_wing():
        engine = engines.make(verifier)
        model, cache = engine.verifier.model, engine.verifier.cache
        tables = [BlockTable([1, 2]) for _ in cache.windows]
        packed = PackedBatch(
            [Span(3, 7, tables)],
            cache.block_size,
            model.dtype,
            model.device,
            windows=cache.windows,
        )
        packed.spans()
        with torch.inference_mode(), Launches() as launches, noted_kernels(launches):
            packed_logits(model, cache, packed, [3, 4, 5], [4, 5, 6], [2])
    assert launches.refused == []
    num_layers = model.config.get_text_config().num_hidden_layers
    assert launches.counts.total() / num_layers < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("verifier", ["gemma-3", "gemma-4-E2B", "llama", "qwen-3"])
def test_norms_are_computed_as_by_transformers(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, verifier: str, dtype: torch.dtype
) -> None:
    """Whatever a model does with its weights; sizes that are no power of 2 too."""
    triton_interpreter.mend(monkeypatch)
    norm = type(tiny.reference(verifier).model.norm)(24, eps=1e-6)
    torch.manual_seed(0)
    norm.weight.data.normal_()
    model = torch.nn.ModuleList([norm.to(dtype)])
    if verifier == "gemma-4-E2B":
        model.append(type(norm)(24, eps=1e-6, with_scale=False))
    originals = list(model)
    fuse_norms(model)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    rows = torch.randn(1, 5, 3, 40).to(dtype)[..., 8:32]
    for fused, original in zip(model, originals, strict=True):
        assert isinstance(fused, FusedRMSNorm)
        for shaped in (rows, rows.transpose(1, 2), rows[0, :, 0]):
            expected = original(shaped)
            torch.testing.assert_close(fused(shaped), expected, rtol=tolerance, atol=tolerance)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ARCHITECTURES = ["gemma-3", "gemma-4-E2B", "llama", "qwen-3"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("verifier", ARCHITECTURES)
@torch.inference_mode()
def test_heads_are_rotated_as_by_transformers(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, verifier: str, dtype: torch.dtype
) -> None:
    """To the last bit, in both orders of dimensions; a part that isn't rotated is left alone."""
    triton_interpreter.mend(monkeypatch)
    attention = deepcopy(tiny.reference(verifier).model.layers[-1].self_attn).to(dtype)
    original = type(attention).forward.__wrapped__.__globals__["apply_rotary_pos_emb"]
    fuse_rotary(attention)
    fused = attention.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert fused is not original
    assert type(attention).forward.__wrapped__.__globals__["apply_rotary_pos_emb"] is original
    torch.manual_seed(0)
    angles = torch.randn(1, 5, 12)
    angles[..., 4:] = 0
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    query = torch.randn(1, 5, 3, 40).to(dtype)[..., 8:32]
    states = [query] if verifier == "gemma-4-E2B" else [query, torch.randn(1, 5, 2, 24).to(dtype)]
    for heads in (1, 2):
        shaped = [each.transpose(1, 2) if heads == 1 else each for each in states]
        found, expected = (f(*shaped, cos, sin, unsqueeze_dim=heads) for f in (fused, original))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    # A batch of two is none of the kernel's.
    two = [each.expand(2, -1, -1, -1) for each in states]
    found, expected = (f(*two, cos, sin, unsqueeze_dim=2) for f in (fused, original))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("verifier", ARCHITECTURES)
@torch.inference_mode()
def test_what_follows_a_norm_is_computed_with_it(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, verifier: str, dtype: torch.dtype
) -> None:
    """Rotations and residuals give what they give behind a norm of its own, to the last bit."""
    triton_interpreter.mend(monkeypatch)
    attention = deepcopy(tiny.reference(verifier).model.layers[-1].self_attn).to(dtype)
    fuse_rotary(attention)
    rotate = attention.forward.__func__.__globals__["apply_rotary_pos_emb"]
    kind = type(tiny.reference(verifier).model.norm)
    torch.manual_seed(0)
    norms = torch.nn.ModuleList([kind(24, eps=1e-6).to(dtype) for _ in range(2)])
    for norm in norms:
        norm.weight.copy_(torch.randn(24))
    fuse_norms(norms)
    cos, sin = torch.randn(2, 1, 5, 24).to(dtype)
    rows = torch.randn(2, 1, 5, 3, 24).to(dtype)
    count = 1 if verifier == "gemma-4-E2B" else 2
    pending = [norm(each) for norm, each in zip(norms, rows[:count], strict=False)]
    made = [finished(norm(each)) for norm, each in zip(norms, rows[:count], strict=False)]
    for heads in (2, 1):
        if heads == 1:
            pending, made = ([x.transpose(1, 2) for x in xs] for xs in (pending, made))
        assert all(type(each) is Pending for each in pending)
        found, expected = (rotate(*x, cos, sin, unsqueeze_dim=heads) for x in (pending, made))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    residual = torch.randn(1, 5, 3, 24).to(dtype)
    found = norms[0](rows[0]) + residual
    assert type(found) is torch.Tensor
    assert torch.equal(found, finished(norms[0](rows[0])) + residual)


@torch.inference_mode()
def test_a_pending_norm_is_computed_for_whatever_asks(tiny: TinyModels) -> None:
    """Once, and what comes of it is plain."""
    norms = torch.nn.ModuleList([type(tiny.reference("llama").model.norm)(24)])
    fuse_norms(norms)
    rows = torch.randn(1, 5, 24)
    made = finished(norms[0](rows))
    pending = norms[0](rows)
    for ask in (
        lambda x: x * 2,
        lambda x: x + 1,
        lambda x: x + torch.ones(24),
        lambda x: x.add(x, alpha=2),
        lambda x: torch.nn.functional.linear(x, torch.ones(3, 24)),
        lambda x: x[0],
        lambda x: torch.cat([x, x]),
        lambda x: x.transpose(0, 1),
        lambda x: x.view(-1, 8),
    ):
        found = ask(pending)
        assert type(found) is torch.Tensor
        assert torch.equal(found, ask(made))
    assert finished(pending).data_ptr() == pending.data_ptr()


@torch.inference_mode()
def test_an_activation_is_multiplied_in_the_same_launch(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where per-layer inputs of Gemma 4 are taken up."""
    layer = deepcopy(tiny.reference("gemma-4-E2B").model.layers[0])
    original = layer.act_fn
    fuse_mlps(layer)
    rows, factors = torch.randn(1, 5, 8), torch.randn(1, 5, 3, 8)[:, :, 1]
    torch.testing.assert_close(layer.act_fn(rows) * factors, original(rows) * factors)
    torch.testing.assert_close(layer.act_fn(rows) + factors, original(rows) + factors)
    with Launches() as launches, noted_kernels(launches):
        layer.act_fn(rows) * factors
    assert launches.counts == {"gate": 1}


def test_a_rotation_that_is_another_stays(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = deepcopy(tiny.reference("llama").model.layers[0].self_attn)
    names = type(attention).forward.__wrapped__.__globals__

    def interleaved(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        def turned(x: Any) -> Any:
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    monkeypatch.setitem(names, "apply_rotary_pos_emb", interleaved)
    fuse_rotary(attention)
    assert "forward" not in vars(attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("verifier", ARCHITECTURES)
@torch.inference_mode()
def test_mlps_compute_as_those_of_transformers(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, verifier: str, dtype: torch.dtype
) -> None:
    """Far into what the activation makes nothing of, too."""
    triton_interpreter.mend(monkeypatch)
    model = torch.nn.ModuleList([deepcopy(tiny.reference(verifier).model.layers[0].mlp).to(dtype)])
    original = model[0]
    fuse_mlps(model)
    assert isinstance(model[0], FusedMLP)
    torch.manual_seed(0)
    rows = (torch.randn(1, 5, 32) * torch.logspace(-3, 1, 5).unsqueeze(1)).to(dtype)
    expected = original(rows)
    rtol, atol = {
        torch.float32: (1e-5, 1e-6),
        torch.float16: (2**-9, 2**-9),
        torch.bfloat16: (2**-6, 2**-6),
    }[dtype]
    largest = float(expected.abs().max())
    torch.testing.assert_close(model[0](rows), expected, rtol=rtol, atol=atol * largest)


def test_an_mlp_that_is_another_stays(tiny: TinyModels) -> None:
    """One with an activation that is nearly GELU's approximation, and one that scales."""
    model = torch.nn.ModuleList([deepcopy(tiny.reference("llama").model.layers[0].mlp)] * 2)
    model[0].act_fn = torch.nn.GELU()
    model.append(deepcopy(tiny.reference("llama").model.layers[0].mlp))
    model[2].register_forward_hook(lambda *given: 1.01 * given[2])
    fuse_mlps(model)
    assert not any(isinstance(each, FusedMLP) for each in model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_are_written_to_their_slots(dtype: torch.dtype) -> None:
    key = torch.randn(1, 5, 2, 24).to(dtype).transpose(1, 2)
    value = torch.randn(1, 2, 5, 40).to(dtype)[..., 8:32]
    keys, values = torch.randn(2, 9, 2, 24).to(dtype)
    slots = torch.tensor([8, 0, 3, 4, 6])
    expected = [pool.clone() for pool in (keys, values)]
    for pool, states in zip(expected, (key, value), strict=True):
        pool[slots] = states[0].transpose(0, 1)
    write_to_pool(key, value, keys, values, slots)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
