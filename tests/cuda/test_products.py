"""Products whose rows don't depend on what other rows there are, in the interpreter."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items

import pytest
import torch
from torch import Tensor, nn

import triton_interpreter
from cuda_wing import InterpretedWing, cuda_wing
from tandem import Engine, UnsupportedModelError
from tandem.cuda.products import InvariantLinear
from tandem.models.attention import PackedBatch, Span
from tandem.models.packed_pass import packed_logits
from tandem.requests.sequence import BlockTable
from tiny_engines import Engines

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is the wing")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("size", "has_bias"), [((48, 80), False), ((200, 320), True)])
@torch.inference_mode()
def test_a_row_has_the_same_bits_among_any(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: tuple[int, int], has_bias: bool
) -> None:
    triton_interpreter.mend(monkeypatch)
    torch.manual_seed(0)
    layer = nn.Linear(size[1], size[0], bias=has_bias, dtype=dtype)
    product = InvariantLinear(layer)
    rows = torch.randn(130, size[1]).to(dtype)
    alone = torch.cat([product(row) for row in rows[:66].split(1)])
    for count in (2, 3, 15, 17, 64, 65):
        assert torch.equal(product(rows[:count]), alone[:count])
    assert torch.equal(product(rows[66 - 64 :].unsqueeze(0))[0, :64], alone[2:])
    made = product(rows).float()
    expected = layer.float()(rows.float())
    torch.testing.assert_close(made, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def logits_of(engine: Engine, lengths: Items[int], which: int) -> Tensor:
    """Behind the last token of one prompt of a pass, each in blocks of its own."""
    model, cache = engine.verifier.model, engine.verifier.cache
    spans, ids, positions, rows = [], [], [], []
    for number, length in enumerate(lengths):
        first = 4 * (number + 1)
        tables = [BlockTable(list(range(first, first + 4))) for _ in cache.windows]
        spans.append(Span(length, length, tables))
        ids += [length + n for n in range(length)]
        positions += range(length)
        rows.append(len(ids) - 1)
    packed = PackedBatch(spans, cache.block_size, model.dtype, model.device, windows=cache.windows)
    return packed_logits(model, cache, packed, ids, positions, rows)[which]


@pytest.mark.slow
@torch.inference_mode()
def test_a_prompt_has_the_same_logits_beside_any(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, in bfloat16; by the library's products they would be others."""
    triton_interpreter.mend(monkeypatch)
    settings = {"dtype": "bfloat16", "max_num_seqs": 4}
    with cuda_wing():
        engine = engines.make("llama", **settings, batch_invariant=True)
        kinds = {type(m) for m in engine.verifier.model.modules()}
        assert InvariantLinear in kinds
        alone = logits_of(engine, [9], 0)
        for lengths in ([1, 9], [9, 16], [7, 9, 16]):
            assert torch.equal(logits_of(engine, lengths, lengths.index(9)), alone)


def test_what_torch_sums_up_is_refused(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton_interpreter.mend(monkeypatch)
    monkeypatch.setattr(InterpretedWing, "prepare", lambda *_: None)
    with cuda_wing():
        with pytest.raises(UnsupportedModelError, match="LlamaRMSNorm is summed up by torch"):
            engines.make("llama", batch_invariant=True)
        caplog.set_level(logging.INFO)
        engines.make("llama")
    assert "batch_invariant is off: LlamaRMSNorm is summed up by torch" in caplog.text
